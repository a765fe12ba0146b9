"""Reference for masks that change between tokens, without a cache: one gate per token and block.

The whole sequence runs in one pass. The output of a block is multiplied by 0 for the tokens for
which the block was removed. Tests compare generation with caches against these logits.
"""

from collections.abc import Mapping, Sequence

import torch


def gated_logits(
    llm,
    tokens: Sequence[Sequence[int]],
    removed: Mapping[int, Sequence[bool]],
) -> torch.Tensor:
    """Logits of all tokens, (B, T, V), in one pass; rows are padded on the left.

    Args:
        llm: A model without a mask.
        tokens: Rows of token ids.
        removed: For each block that was ever removed, whether it was for each of the T columns.
    """
    length = max(map(len, tokens))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in tokens])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens])
    handles = []
    for index, gone in removed.items():
        gate = 1.0 - torch.tensor(gone, dtype=torch.float32)
        module = llm.adapter.sites(llm.model)[index].slots[0].original
        handles.append(module.register_forward_hook(_gate(gate, len(tokens))))
    try:
        with torch.no_grad():
            return llm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
    finally:
        for handle in handles:
            handle.remove()


def _gate(gate: torch.Tensor, batch: int):
    def hook(_module, _args, output):
        whole = output[0] if isinstance(output, tuple) else output
        gated = (whole.view(batch, len(gate), -1) * gate[None, :, None]).view(whole.shape)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated

    return hook

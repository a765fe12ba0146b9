"""What masks that change between tokens mean, without any cache: each token has a gate per block.

The whole sequence runs at once. The output of a block counts for the tokens that it was there for,
and a block that was restored "from here" looks at nothing before. An independent statement of what
live masks compute, to hold caches against.
"""

from collections.abc import Mapping, Sequence

import torch


def gated_logits(
    llm,
    tokens: Sequence[Sequence[int]],
    removed: Mapping[int, Sequence[bool]],
    late: Mapping[int, Sequence[int]] | None = None,
) -> torch.Tensor:
    """Logits of all tokens, (B, T, V), in one pass; rows are padded on the left.

    Args:
        llm: A model without a mask.
        tokens: Rows of token ids.
        removed: For each block that was ever removed, whether it was for each of the T columns.
        late: Layers whose attention began anew at some columns: from each on it sees none before.
    """
    length = max(map(len, tokens))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in tokens])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens])
    handles = []
    for index, gone in removed.items():
        gate = 1.0 - torch.tensor(gone, dtype=torch.float32)
        module = llm.adapter.sites(llm.model)[index].slots[0].original
        handles.append(module.register_forward_hook(_gate(gate, len(tokens))))
    for layer, starts in (late or {}).items():
        module = llm.adapter.sites(llm.model)[2 * layer].slots[0].original
        handles.append(module.register_forward_pre_hook(_blind(starts), with_kwargs=True))
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


def _blind(starts: Sequence[int]):
    def hook(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(length, length).tril().bool()[None, None]
        mask = mask.clone().expand(hidden.shape[0], 1, length, length).clone()
        nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        for start in starts:
            mask[:, :, start:, :start] = nothing
        return args, {**kwargs, "attention_mask": mask}

    return hook

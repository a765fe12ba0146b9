"""Generation by hand: what `generate` does, one token at a time, over any version's cache."""

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache

from rap_env.models.caches.kv_cache import cache_argument


def cached_step(model, ids, cache, attention_mask=None) -> torch.Tensor:
    """Logits for the tokens `ids`, with the past in `cache`."""
    past = {cache_argument(model): cache}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention_mask, use_cache=True, **past).logits


def token_by_token(model, input_ids, attention_mask, prompt: int) -> torch.Tensor:
    """Logits of all tokens: `prompt` of them in one pass, then one at a time.

    No position ids are given: the model takes them from its cache, or from the mask.
    """
    cache = DynamicCache(config=model.config)
    total = input_ids.shape[1]
    ends = [prompt, *range(prompt + 1, total + 1)]
    starts = [0, *ends[:-1]]
    parts = [
        cached_step(model, input_ids[:, start:end], cache, attention_mask[:, :end])
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts, dim=1)


def gated_logits(
    llm, tokens: Sequence[Sequence[int]], removed: Mapping[int, Sequence[bool]]
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

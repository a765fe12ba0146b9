"""Generation by hand: what `generate` does, one token at a time, over any version's cache."""

import inspect

import torch
from transformers import DynamicCache


def cached_step(model, ids, cache, attention_mask=None) -> torch.Tensor:
    """Logits for the tokens `ids`, with the past in `cache`."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=attention_mask, use_cache=True, **{name: cache}
        )
    return output.logits


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

"""Text that a model writes itself: calibration data for which nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rap_env.errors import UnsupportedModelError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan

TEMPERATURE, TOP_P = 0.9, 0.95
"""How tokens are sampled."""

_BATCH = 16  # sequences at a time


def start_token(llm: ElasticLLM) -> int | None:
    """The token that a model's text starts with, if it has one."""
    start: int | None = llm.model.generation_config.bos_token_id
    other: int | None = llm.model.config.bos_token_id
    return other if start is None else start


def self_written(
    llm: ElasticLLM,
    windows: int,
    window_tokens: int,
    seed: int,
    note: Callable[[int], object] = lambda tokens: None,
) -> torch.Tensor:
    """Windows of text that the dense model writes, (windows, window_tokens); each is a sequence.

    Args:
        llm: The model.
        windows: Number of windows.
        window_tokens: Tokens of each.
        seed: Seed of the sampling; the process's own random numbers are not touched.
        note: Called with the number of new tokens, from time to time.

    Raises:
        UnsupportedModelError: The model has no start token.
    """
    start = start_token(llm)
    if start is None:
        raise UnsupportedModelError(
            f"{llm.name} has no start token (bos_token_id) to write text from."
        )
    special = sorted({*getattr(llm.tokenizer, "all_special_ids", ()), start})
    devices = [llm.device] if llm.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices), llm.masked(Plan()):
        torch.manual_seed(seed)
        for first in range(0, windows, _BATCH):
            size = min(_BATCH, windows - first)
            ids = torch.full((size, 1), start, device=llm.device)
            written = llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                suppress_tokens=special,
                min_new_tokens=window_tokens,
                max_new_tokens=window_tokens,
                pad_token_id=start,
            )
            parts.append(written[:, 1:].cpu())
            note(size * window_tokens)
    return torch.cat(parts)

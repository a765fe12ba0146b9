"""The text that a model's levels are made with: what it writes itself, or text in the package."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import UnsupportedModelError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan

log = logging.getLogger(__name__)

TEXTS = Path(__file__).parent / "texts"
"""Folder of the texts in the package that levels of packaged models are made with."""

TEMPERATURE, TOP_P = 0.9, 0.95
"""How tokens are sampled."""

_BATCH = 16  # sequences at a time

_TOKENS, _WINDOW_TOKENS, _SEED = 10_240, 256, 0
_TEXT_KIND, _TEXT_FORMAT = "calibration text", 1


def start_token(llm: ElasticLLM) -> int | None:
    """The token that a model's text starts with, if it has one."""
    start: int | None = llm.model.generation_config.bos_token_id
    other: int | None = llm.model.config.bos_token_id
    return other if start is None else start


def generate_windows(
    llm: ElasticLLM,
    windows: int,
    window_tokens: int,
    seed: int,
    note: Callable[[int], object] = lambda tokens: None,
    *,
    first_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Windows of text that the dense model writes, (windows, window_tokens); each is a sequence.

    Args:
        llm: The model.
        windows: Number of windows.
        window_tokens: Tokens of each.
        seed: Seed of the sampling; the process's own random numbers are not touched.
        note: Called with the number of new tokens, from time to time.
        first_tokens: The first token of each window, (windows,); by default windows follow
            the start token, which is not part of them.
    """
    start = start_token(llm)
    if start is None:
        raise UnsupportedModelError(
            f"{llm.name} has no start token (bos_token_id) to write text from."
        )
    special = sorted({*getattr(llm.tokenizer, "all_special_ids", ()), start})
    devices = [llm.device] if llm.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices), llm.applied(Plan()):
        torch.manual_seed(seed)
        for first in range(0, windows, _BATCH):
            size = min(_BATCH, windows - first)
            ids = torch.full((size, 1), start, device=llm.device)
            if first_tokens is not None:
                ids = first_tokens[first : first + size, None].to(llm.device)
            new_tokens = window_tokens - (first_tokens is not None)
            written = llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                suppress_tokens=special,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=start,
            )
            parts.append(written[:, -window_tokens:].cpu())
            note(size * window_tokens)
    return torch.cat(parts)


def calibration_windows(llm: ElasticLLM) -> torch.Tensor:
    """The text that a model's levels are made with by default, (windows, tokens): its own.

    Half of the windows begin with random tokens (as in Liu et al. 2023, LLM-QAT), because 40
    windows of the default model began with 15 different ones; this lowered the loss of FFN
    blocks at int3 from 0.25 to 0.23 nats per token.
    """
    if (packaged := packaged_windows(llm)) is not None:
        return packaged
    path = cache_dir() / "calibrated" / f"{llm.fingerprint[:16]}-text.json"
    with contextlib.suppress(FileNotFoundError):
        return torch.tensor(load_artifact(path, _TEXT_KIND, _TEXT_FORMAT)["tokens"])
    log.warning("%s writes the text that its levels are made with (once)", llm.name)
    tokens = min(_WINDOW_TOKENS, llm.adapter.max_positions - 1)
    count = _TOKENS // tokens
    generator = torch.Generator().manual_seed(_SEED)
    first_tokens = torch.randint(0, llm.facts.vocab_size, (count,), generator=generator)
    windows = torch.cat(
        [
            generate_windows(llm, count, tokens, _SEED),
            generate_windows(llm, count, tokens, _SEED, first_tokens=first_tokens),
        ]
    )
    save_artifact(path, _TEXT_KIND, _TEXT_FORMAT, {"tokens": windows.tolist()})
    return windows


def packaged_windows(llm: ElasticLLM) -> torch.Tensor | None:
    """The text in the package that a packaged model's levels are made with, if it is one."""
    path = TEXTS / f"{llm.fingerprint[:16]}.json"
    if not path.is_file():
        return None
    return torch.tensor(load_artifact(path, _TEXT_KIND, _TEXT_FORMAT)["tokens"])

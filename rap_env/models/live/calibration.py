"""Calibration of a live model: text that it writes itself, and int4 weights that a text makes.

Without a text, the int4 level of a block is made from its weights. With one it is made by GPTQ
(both in `models.weights.quantisers`), which loses far less where the model was shipped in more
bits. The blocks are made in order, and the inputs of each are those that the int4 blocks before it
give, so that later blocks make up for errors of earlier ones.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import torch

from rap_env.errors import UnsupportedModelError
from rap_env.models.files.model_folder import made_once
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.packed_layout import PackedLevel
from rap_env.models.weights.packed_modules import raw_weights
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import hessians, quantise_gptq
from rap_env.models.weights.residency import verified_tensors, write_tensors
from rap_env.models.weights.weight_levels import WeightItem
from rap_env.paths import cache_dir
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


log = logging.getLogger(__name__)

_LEVEL: PackedLevel = "int4"
_VERSION = 1
"""Part of the names of files: increase it when the weights come out differently."""


def calibrate(llm: ElasticLLM, windows: torch.Tensor) -> None:
    """Make the int4 level of all blocks with a text; the levels that are int4 already stay.

    The result is kept in the cache folder, and read from there by later processes. It takes two
    passes over the text and, for a model of 100 million parameters in its blocks, about a minute.
    Call it before scoring: the hash of the text becomes part of the keys of scores.

    Args:
        llm: The model. If it has views (`repaired`), make them afterwards.
        windows: Token ids, (windows, tokens); ten thousand tokens are enough for good weights.
    """
    text = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes())
    text.update(f"{tuple(windows.shape)} v{_VERSION}".encode())
    digest = text.hexdigest()
    folder = cache_dir() / "calibrated" / f"{llm.fingerprint[:16]}-{digest[:16]}"
    with llm.exclusive(), llm.masked(Plan()):
        residency = llm.residency
        llm.set_residency("resident")
        items = [item for item in llm._live.items if _LEVEL in item.levels]
        for item in llm._live.items:
            item.calibration = digest
        made_once(folder, partial(_make, llm, windows), f"Calibrating {llm.name} (once; minutes)")
        for item in items:
            item.build(_LEVEL, verified_tensors(folder / f"{item.name}.safetensors"))
        llm.__dict__.pop("facts", None)
        llm.set_residency(residency)


def _make(llm: ElasticLLM, windows: torch.Tensor, folder: Path) -> dict[str, str]:
    """Write the int4 weights of each block."""
    forward = PartialForward(llm)
    states = [forward.enter(window[None].to(llm.device)) for window in windows]
    for number, step in enumerate(forward.steps):
        log.info("Step %d of %d is calibrated", number + 1, len(forward.steps))
        items = {index: llm._live.items[index] for index in step}
        lowered = {index: item for index, item in items.items() if _LEVEL in item.levels}
        _quantise(forward, lowered.values(), step, states)
        plan = Plan(weights=tuple((index, _LEVEL) for index in lowered))
        states = [forward.run(step, state, plan) for state in states]
        for item in lowered.values():
            write_tensors(folder / f"{item.name}.safetensors", item.tensors(_LEVEL))
    return {"model": llm.name}


@torch.inference_mode(False)
@torch.no_grad()
def _quantise(
    forward: PartialForward,
    items: Collection[WeightItem],
    step: tuple[int, ...],
    states: Iterable[torch.Tensor],
) -> None:
    places = {p.name: p for item in items for p in item.places if not p.keeps(_LEVEL)}
    layers = {name: p.original for name, p in places.items() if not raw_weights(p.original)}
    with hessians(layers) as sums:
        for state in states:
            forward.run(step, state)
    quantisers = {places[name]: partial(_gptq, hessian) for name, hessian in sums.items()}
    for item in items:
        item.quantise(_LEVEL, quantisers)


def _gptq(hessian: torch.Tensor, weight: torch.Tensor, _level: PackedLevel) -> PackedMatrix:
    return quantise_gptq(weight, hessian)

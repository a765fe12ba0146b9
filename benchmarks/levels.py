"""Levels that a running model has and changes to: ``python -m benchmarks.levels``.

Decode steps and prefills of the model with the packed weights of its file and of the same
model unquantised run in turn; so do those with and without FFN blocks at three bits, and decode
steps with a quantised and an unquantised cache. Then all levels of a running batch change at
once: from native to int4 weights and caches, in place, once all levels have been in use.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.measuring import (
    ModelSettings,
    alternate,
    open_model,
    ratios,
    seconds_of,
    target,
    write_record,
)
from experiments.study.console import run_with_settings
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan

Call = Callable[[], object]


@dataclass
class LevelsSettings(ModelSettings):
    """Settings of this benchmark."""

    context_tokens: int = 512
    """Tokens in the cache of the decode steps, of the changed batch, and of the prefill."""
    cache_tokens: int = 2048
    """Tokens of each of eight rows behind which decode steps run with a quantised cache."""
    steps: int = 8
    """Decode steps in one measurement."""


def main(settings: LevelsSettings) -> None:
    """Measure, and write the record."""
    wide = open_model(settings)
    packed, lowered = (open_model(settings, "native") for _ in range(2))
    few_bits = lowered.facts.blocks_at("int3")
    lowered.apply(Plan.of({name: n for name, n in few_bits.items() if name.endswith("ffn")}))
    tokens, steps, dtype = settings.context_tokens, settings.steps, wide.facts.dtype
    seconds: dict[str, dict[str, list[float]]] = {}
    targets: list[dict[str, Any]] = []

    def compare(what: str, at_most: float, against: str, new: Call, old: Call) -> None:
        side = seconds[what] = alternate({"new": new, "old": old}, settings.repeats)
        times, what = ratios(side["new"], side["old"]), f"times the time of a {what}"
        targets.append(target(what, *times, at_most=at_most, against=against))

    pairs = [("weights packed", (packed, wide), f"{dtype} weights", (0.85, 1.0, 1.15))]
    if few_bits:
        what = "FFN weights at int3"
        pairs.append((what, (lowered, packed), "packed weights", (1.5, 1.25, 1.2)))
    for what, pair, against, (single, several, prefill) in pairs:
        for rows, at_most in ((1, single), (8, several)):
            sides = [stepping(batch_of(llm, rows, tokens), steps) for llm in pair]
            shown = f"decode step of {rows} row{'s' * (rows > 1)}, {what}"
            compare(shown, at_most, against, *sides)
        prefills = [partial(batch_of, llm, 1, tokens) for llm in pair]
        compare(f"prefill of {tokens} tokens, {what}", prefill, against, *prefills)
    sides = [cached_steps(settings, cache) for cache in ("int4", "native")]
    shown = f"decode step of 8x{settings.cache_tokens} tokens, cache in int4"
    compare(shown, 1.3, f"a {dtype} cache, with room", *sides)
    change_s, step_s = changes(wide, settings)
    targets.append(
        target(
            "decode steps that a change of the levels of all weights and caches takes",
            *ratios(change_s, step_s),
            at_most=3.0,
            against=f"a decode step: {1000 * median(step_s):.1f} ms",
        )
    )
    device = str(wide.device)
    write_record("levels", settings, targets, device=device, seconds=seconds, change_s=change_s)


def batch_of(llm: ElasticLLM, rows: int, tokens: int, reserve_tokens: int = 0) -> LiveBatch:
    """A batch whose cache holds `tokens` random tokens of each row."""
    drawn, batch = random.Random(rows), LiveBatch(llm)
    batch.reserve_tokens = reserve_tokens
    batch.prefill([drawn.choices(range(llm.adapter.vocab_size), k=tokens) for _ in range(rows)])
    return batch


def stepping(batch: LiveBatch, steps: int) -> Call:
    """A call that runs some decode steps."""

    def run() -> None:
        for _ in range(steps):
            batch.extend([1] * batch.size)

    return run


def cached_steps(settings: LevelsSettings, cache: str) -> Call:
    """Decode steps with caches at a level, in a copy of the model of their own.

    Unquantised caches have room for all tokens, as those of the server, and are not copied.
    """
    llm, room = open_model(settings, "native"), settings.steps * (settings.repeats + 1)
    llm.apply(Plan.uniform(llm.facts.num_layers, caches=cache))
    before = max(1, settings.cache_tokens - room // 2)
    reserved = settings.cache_tokens + room if cache == "native" else 0
    return stepping(batch_of(llm, 8, before, reserved), settings.steps)


def changes(llm: ElasticLLM, settings: LevelsSettings) -> tuple[list[float], list[float]]:
    """Seconds of changing all levels under a running batch, and of a decode step before it."""
    facts = llm.facts
    caches = Plan.uniform(facts.num_layers, caches="int4").levels if facts.kv_heads else {}
    levels = {**facts.blocks_at("int4"), **caches}
    if "int8" in facts.embedding_levels:
        levels["embeddings"] = "int8"
    change_s, step_s = [], []
    for _ in range(settings.repeats + 1):  # the first one makes the levels
        batch = batch_of(llm, 1, settings.context_tokens)
        step_s.append(seconds_of(stepping(batch, settings.steps)) / settings.steps)
        change_s.append(seconds_of(partial(llm.apply, Plan.of(levels))))
        llm.apply(Plan())
        batch.close()
    return change_s[1:], step_s[1:]


if __name__ == "__main__":
    run_with_settings(LevelsSettings, main)

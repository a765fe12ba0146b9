"""Speed and bytes of levels against unquantised ones: ``python -m benchmarks.levels``.

Decode steps and prefills of the model with packed weights and of the same model unquantised run in
turn, and so do decode steps with a quantised and an unquantised cache. Then all levels of a running
batch change at once, and the bytes of every level are compared with those of its tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import harness
from benchmarks.record import write_record
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import CompressionPlan
from rap_env.request import Request

_DECODE_TARGETS = {1: 0.85, 8: 1.0}
_PREFILL_TARGET, _CACHE_TARGET, _CHANGE_TARGET = 1.15, 1.3, 3.0
_FREED_TARGET = 5.0


@dataclass
class LevelsSettings(harness.ModelSettings):
    """Settings of this benchmark."""

    packed: str = "native"
    """Format of the packed weights: ``native`` (of a 4-bit GGUF file), ``int4`` or ``int8``."""
    rows: list[int] = field(default_factory=lambda: [1, 8])
    """Numbers of rows of the decode steps."""
    context_tokens: int = 512
    """Tokens in the cache of the decode steps, of the changed batch, and of the prefill."""
    cache: str = "int4"
    """Level of the quantised cache."""
    cache_request: str = "8x2048"
    """Rows x tokens of its decode step."""
    caches: list[str] = field(
        default_factory=lambda: ["int8", "int4", "int2", "window512", "int4-window512"]
    )
    """Levels of caches whose bytes are compared."""
    bytes_tokens: int = 600
    """Tokens in these caches."""
    steps: int = 8
    """Decode steps in one measurement."""


def main(settings: LevelsSettings) -> None:
    """Measure, and write the record."""
    wide = harness.open_model(settings, weights="bf16")
    packed = harness.open_model(settings, weights=settings.packed)
    decode = {rows: _decoding(wide, packed, rows, settings) for rows in settings.rows}
    prefill = _prefilling(wide, packed, settings)
    cache = _cached(packed, settings)
    change = _changing(wide, settings)
    sizes = _bytes_of_levels(wide, settings)
    freed = _freeing(wide)
    unquantised, against = f"{wide.facts.dtype} weights", "times the time of"
    targets = [
        harness.Target.of(
            f"{against} a decode step of {rows} row{'s' if rows > 1 else ''}, weights packed",
            found["ratio"],
            at_most=_DECODE_TARGETS.get(rows, 1.0),
            against=unquantised,
        )
        for rows, found in decode.items()
    ]
    targets += [
        harness.Target.of(
            f"{against} a prefill of {settings.context_tokens} tokens, weights packed",
            prefill["ratio"], at_most=_PREFILL_TARGET, against=unquantised,
        ),
        *(
            harness.Target.of(
                f"{against} a decode step of {settings.cache_request} tokens, cache in "
                f"{settings.cache}",
                found["ratio"], at_most=_CACHE_TARGET,
                against=f"a {wide.facts.dtype} cache, {name}",
            )
            for name, found in cache.items()
        ),
        harness.Target.of(
            "decode steps that a change of the levels of all weights and caches takes",
            change["ratio"], at_most=_CHANGE_TARGET,
            against=f"a decode step: {1000 * change['step_s']['median']:.1f} ms",
        ),
        harness.Target(
            "bytes between predicted and held, at most, over all levels", None, 0.0,
            max(abs(row["difference_bytes"]) for row in sizes.values()),
            f"{len(sizes)} levels of weights and caches",
        ),
        harness.Target(
            "% that memory freed by lower weights differs from the predicted, at most", None,
            _FREED_TARGET, max(abs(row["difference_percent"]) for row in freed.values()),
            "the bytes of the levels; weights offloaded",
        ),
    ]  # fmt: skip
    write_record(
        "levels",
        device=str(wide.device),
        settings=settings,
        targets=targets,
        measured={
            "decode": {f"{rows}_rows": found for rows, found in decode.items()},
            "prefill": prefill,
            "cache": cache,
            "change": change,
            "bytes": sizes,
            "freed": freed,
        },
        notes=[
            f"{wide.facts.dtype}; packed weights are {packed.facts.weights}; "
            f"{settings.context_tokens} tokens of context.",
            "The change is from native to int4 weights and caches, in place, once all levels "
            "have been in use; going back refills the caches.",
        ],
    )


def batch_of(llm: ElasticLLM, rows: int, tokens: int, reserve_tokens: int = 0) -> LiveBatch:
    """A batch whose cache holds `tokens` random tokens of each row."""
    drawn = random.Random(rows)
    batch = LiveBatch(llm, restore="next_request")
    batch.reserve_tokens = reserve_tokens
    batch.prefill([drawn.choices(range(llm.adapter.vocab_size), k=tokens) for _ in range(rows)])
    return batch


def stepping(batch: LiveBatch, steps: int) -> Callable[[], None]:
    """A call that runs some decode steps."""

    def run() -> None:
        for _ in range(steps):
            batch.extend([1] * batch.size)

    return run


def _compared(
    sides: dict[str, Callable[[], object]], settings: LevelsSettings, calls: int
) -> dict[str, Any]:
    """Seconds of one call of ``new`` and ``old``, measured in turn, and their ratio."""
    seconds = harness.alternate(sides, settings.repeats)
    one = {name: [total / calls for total in found] for name, found in seconds.items()}
    return {
        "ratio": harness.ratios(one["new"], one["old"]),
        "new_s": harness.spread(one["new"]),
        "old_s": harness.spread(one["old"]),
    }


def _decoding(
    wide: ElasticLLM, packed: ElasticLLM, rows: int, settings: LevelsSettings
) -> dict[str, Any]:
    models = {"new": packed, "old": wide}
    sides: dict[str, Callable[[], object]] = {
        name: stepping(batch_of(llm, rows, settings.context_tokens), settings.steps)
        for name, llm in models.items()
    }
    return _compared(sides, settings, settings.steps)


def _prefilling(wide: ElasticLLM, packed: ElasticLLM, settings: LevelsSettings) -> dict[str, Any]:
    tokens = settings.context_tokens
    sides: dict[str, Callable[[], object]] = {
        "new": lambda: batch_of(packed, 1, tokens),
        "old": lambda: batch_of(wide, 1, tokens),
    }
    return _compared(sides, settings, 1)


def _cached(llm: ElasticLLM, settings: LevelsSettings) -> dict[str, Any]:
    """Steps with a quantised and with unquantised caches; each has its own copy of the model.

    The unquantised caches are copied at each step, as transformers' own, or have room for all
    tokens, as those of the server.
    """
    rows, tokens = harness.parse_request(settings.cache_request)
    layers = llm.facts.num_layers
    room = settings.steps * (settings.repeats + 1)
    sides: dict[str, Callable[[], object]] = {}
    kinds = {
        "copied": ("native", 0),
        "with room": ("native", tokens + room),
        "new": (settings.cache, 0),
    }
    for name, (cache, reserve_tokens) in kinds.items():
        model = harness.open_model(settings, weights=settings.packed)
        model.apply(CompressionPlan.uniform(layers, caches=cache))
        batch = batch_of(model, rows, max(1, tokens - room // 2), reserve_tokens)
        sides[name] = stepping(batch, settings.steps)
    seconds = harness.alternate(sides, settings.repeats)
    steps = {name: [s / settings.steps for s in some] for name, some in seconds.items()}
    return {
        name: {
            "ratio": harness.ratios(steps["new"], steps[name]),
            "new_s": harness.spread(steps["new"]),
            "old_s": harness.spread(steps[name]),
        }
        for name in ("copied", "with room")
    }


def _changing(llm: ElasticLLM, settings: LevelsSettings) -> dict[str, Any]:
    """Seconds of lowering everything under a running batch, in decode steps before it."""
    lowered = _all_lowered(llm)
    change_s, step_s, back_s = [], [], []
    for _ in range(settings.repeats + 1):  # the first one makes the levels
        batch = batch_of(llm, 1, settings.context_tokens)
        step_s.append(harness.seconds_of(stepping(batch, settings.steps)) / settings.steps)
        change_s.append(harness.seconds_of(lambda: llm.apply(lowered)))
        back_s.append(harness.seconds_of(lambda: llm.apply(CompressionPlan())))
        batch.close()
    return {
        "ratio": harness.ratios(change_s[1:], step_s[1:]),
        "change_s": harness.spread(change_s[1:]),
        "back_s": harness.spread(back_s[1:]),
        "step_s": harness.spread(step_s[1:]),
        "first_change_s": change_s[0],
    }


def _all_lowered(llm: ElasticLLM) -> CompressionPlan:
    """Every item at int4 (embeddings at int8), as far as the model has these levels."""
    levels = [plan for name, plan in weight_plans(llm) if name == "int4"]
    lowered = levels[0] if levels else CompressionPlan()
    caches = CompressionPlan.uniform(llm.facts.num_layers, caches="int4").levels
    return lowered.lower(caches) if llm.facts.kv_heads else lowered


def weight_plans(llm: ElasticLLM) -> Iterator[tuple[WeightLevel, CompressionPlan]]:
    """Plans with all blocks at one level, as far as blocks have it, and embeddings at int8."""
    facts = llm.facts
    levels: tuple[WeightLevel, ...] = ("int8", "int4")
    for level in levels:
        weights = tuple(
            (index, level)
            for index in range(facts.num_blocks)
            if level in facts.weight_levels(index)
        )
        embeddings: WeightLevel = "int8" if "int8" in facts.embedding_levels else "native"
        if weights:
            yield level, CompressionPlan(weights=weights, embeddings=embeddings)


def _bytes_of_levels(llm: ElasticLLM, settings: LevelsSettings) -> dict[str, dict[str, int]]:
    """Predicted and held bytes of each level of weights and of caches."""
    memory, tokens = MemoryModel(llm), settings.bytes_tokens
    request = Request(2, tokens, budget_bytes=2**62)
    layers, found = llm.facts.num_layers, {}
    llm.set_residency("offload")  # so that only the levels in use are in memory
    plans = {"weights native": CompressionPlan()}
    plans |= {f"weights {level}": plan for level, plan in weight_plans(llm)}
    plans |= {
        f"cache {cache}": CompressionPlan.uniform(layers, caches=cache)
        for cache in (settings.caches if llm.facts.kv_heads else [])
    }
    for name, plan in plans.items():
        llm.apply(plan)
        batch = batch_of(llm, request.batch_size, tokens)
        held = memory.breakdown(plan, request)
        predicted = held.weights + held.stubs + held.embeddings + held.kv_cache
        measured = llm.held_bytes.weights + batch.kv_bytes
        batch.close()
        found[name] = {
            "predicted_bytes": predicted,
            "held_bytes": measured,
            "difference_bytes": predicted - measured,
        }
    llm.apply(CompressionPlan())
    return found


def _freeing(llm: ElasticLLM) -> dict[str, dict[str, Any]]:
    """Memory of the process that lower weights free, and the bytes that they should."""
    from rap_env.runtime.memory_meter import process_meter

    llm.set_residency("offload")
    meter, memory = process_meter(llm, reset_mark=True), MemoryModel(llm)
    request = Request(1, 1, budget_bytes=2**62)
    rows: dict[str, dict[str, Any]] = {}
    for level, plan in weight_plans(llm):
        llm.apply(plan)  # makes the level, once
        llm.apply(CompressionPlan())
        native, lowered = (memory.breakdown(p, request) for p in (CompressionPlan(), plan))
        predicted = native.peak - native.workspace - lowered.peak + lowered.workspace
        before = meter.used_bytes()
        seconds = harness.seconds_of(lambda: llm.apply(plan))  # noqa: B023
        freed = before - meter.used_bytes()
        llm.apply(CompressionPlan())
        rows[level] = {
            "predicted_bytes": predicted,
            "freed_bytes": freed,
            "difference_percent": 100 * (freed - predicted) / predicted,
            "change_s": seconds,
        }
    return rows


if __name__ == "__main__":
    harness.launch(LevelsSettings, main)

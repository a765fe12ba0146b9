"""Speed and bytes of levels against unquantised ones: ``python -m benchmarks.levels``.

Decode steps and prefills of the model with packed weights and of the same model unquantised run in
turn, and so do decode steps with a quantised and an unquantised cache. Then all levels of a running
batch change at once, and the bytes of every level are compared with those of its tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import (
    ModelSettings,
    alternate,
    launch,
    open_model,
    parse_request,
    ratios,
    seconds_of,
    spread,
)
from benchmarks.record import Target, write_record
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.request import Request

_DECODE_AT_MOST = {1: 0.85, 8: 1.0}
_PREFILL_AT_MOST, _CACHE_AT_MOST, _CHANGE_AT_MOST, _FREED_PERCENT_AT_MOST = 1.15, 1.3, 3.0, 5.0

Measured = dict[str, Any]


@dataclass
class LevelsSettings(ModelSettings):
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
    wide = open_model(settings, weights="bf16")
    packed = open_model(settings, weights=settings.packed)
    wide_weights, targets = f"{wide.facts.dtype} weights", []

    def compare(what: str, sides: Measured, calls: int, at_most: float, against: str) -> Measured:
        compared = _compared(sides, settings.repeats, calls)
        what = f"times the time of a {what}"
        targets.append(Target.of(what, compared["ratio"], at_most=at_most, against=against))
        return compared

    measured: dict[str, Any] = {"decode": {}, "cache": {}}
    for rows in settings.rows:
        measured["decode"][f"{rows}_rows"] = compare(
            f"decode step of {rows} row{'s' * (rows > 1)}, weights packed",
            {
                name: _stepping(batch_of(llm, rows, settings.context_tokens), settings.steps)
                for name, llm in (("new", packed), ("old", wide))
            },
            settings.steps, _DECODE_AT_MOST.get(rows, 1.0), wide_weights,
        )  # fmt: skip
    measured["prefill"] = compare(
        f"prefill of {settings.context_tokens} tokens, weights packed",
        {
            "new": lambda: batch_of(packed, 1, settings.context_tokens),
            "old": lambda: batch_of(wide, 1, settings.context_tokens),
        },
        1, _PREFILL_AT_MOST, wide_weights,
    )  # fmt: skip
    for name, sides in _cache_sides(settings):
        measured["cache"][name] = compare(
            f"decode step of {settings.cache_request} tokens, cache in {settings.cache}",
            sides, settings.steps, _CACHE_AT_MOST, f"a {wide.facts.dtype} cache, {name}",
        )  # fmt: skip
    change = measured["change"] = _changing(wide, settings)
    sizes = measured["bytes"] = _bytes_of_levels(wide, settings)
    freed = measured["freed"] = _freeing(wide)
    targets += [
        Target.of(
            "decode steps that a change of the levels of all weights and caches takes",
            change["ratio"],
            at_most=_CHANGE_AT_MOST,
            against=f"a decode step: {1000 * change['step_s']['median']:.1f} ms",
        ),
        Target(
            "bytes between predicted and held, at most, over all levels", None, 0.0,
            max(abs(row["difference_bytes"]) for row in sizes.values()),
            f"{len(sizes)} levels of weights and caches",
        ),
        Target(
            "% that memory freed by lower weights differs from the predicted, at most", None,
            _FREED_PERCENT_AT_MOST,
            max(abs(row["difference_percent"]) for row in freed.values()),
            "the bytes of the levels; weights offloaded",
        ),
    ]  # fmt: skip
    write_record(
        "levels",
        device=str(wide.device),
        settings=settings,
        targets=targets,
        measured=measured,
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


def _stepping(batch: LiveBatch, steps: int) -> Callable[[], None]:
    """A call that runs some decode steps."""

    def run() -> None:
        for _ in range(steps):
            batch.extend([1] * batch.size)

    return run


def _compared(
    sides: Mapping[str, Callable[[], object]], repeats: int, calls: int
) -> dict[str, Any]:
    """Seconds of one call of ``new`` and ``old``, measured in turn, and their ratio."""
    seconds = {n: [total / calls for total in t] for n, t in alternate(sides, repeats).items()}
    return {
        "ratio": ratios(seconds["new"], seconds["old"]),
        "new_s": spread(seconds["new"]),
        "old_s": spread(seconds["old"]),
    }


def _cache_sides(settings: LevelsSettings) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """Steps with a quantised and with unquantised caches; each has its own copy of the model.

    The unquantised caches are copied at each step, as transformers' own, or have room for all
    tokens, as those of the server.
    """
    rows, tokens = parse_request(settings.cache_request)
    room = settings.steps * (settings.repeats + 1)

    def side(cache: str, reserve_tokens: int) -> Callable[[], None]:
        model = open_model(settings, weights=settings.packed)
        model.apply(Plan.uniform(model.facts.num_layers, caches=cache))
        batch = batch_of(model, rows, max(1, tokens - room // 2), reserve_tokens)
        return _stepping(batch, settings.steps)

    for name, reserve_tokens in (("copied", 0), ("with room", tokens + room)):
        yield name, {"old": side("native", reserve_tokens), "new": side(settings.cache, 0)}


def _changing(llm: ElasticLLM, settings: LevelsSettings) -> dict[str, Any]:
    """Seconds of lowering everything under a running batch, in decode steps before it."""
    lowered = _all_lowered(llm)
    change_s, step_s, back_s = [], [], []
    for _ in range(settings.repeats + 1):  # the first one makes the levels
        batch = batch_of(llm, 1, settings.context_tokens)
        step_s.append(seconds_of(_stepping(batch, settings.steps)) / settings.steps)
        change_s.append(seconds_of(lambda: llm.apply(lowered)))
        back_s.append(seconds_of(lambda: llm.apply(Plan())))
        batch.close()
    return {
        "ratio": ratios(change_s[1:], step_s[1:]),
        "change_s": spread(change_s[1:]),
        "back_s": spread(back_s[1:]),
        "step_s": spread(step_s[1:]),
        "first_change_s": change_s[0],
    }


def _all_lowered(llm: ElasticLLM) -> Plan:
    """Every item at int4 (embeddings at int8), as far as the model has these levels."""
    lowered = dict(weight_plans(llm)).get("int4", Plan())
    caches = Plan.uniform(llm.facts.num_layers, caches="int4").levels
    return lowered.lower(caches) if llm.facts.kv_heads else lowered


def weight_plans(llm: ElasticLLM) -> Iterator[tuple[WeightLevel, Plan]]:
    """Plans with all blocks at one level, as far as blocks have it, and embeddings at int8."""
    facts = llm.facts
    levels: tuple[WeightLevel, ...] = ("int8", "int4")
    for level in levels:
        blocks = (i for i in range(facts.num_blocks) if level in facts.weight_levels(i))
        weights = tuple((index, level) for index in blocks)
        embeddings: WeightLevel = "int8" if "int8" in facts.embedding_levels else "native"
        if weights:
            yield level, Plan(weights=weights, embeddings=embeddings)


def _bytes_of_levels(llm: ElasticLLM, settings: LevelsSettings) -> dict[str, dict[str, int]]:
    """Predicted and held bytes of each level of weights and of caches."""
    memory, tokens, rows = MemoryModel(llm), settings.bytes_tokens, {}
    request = Request(2, tokens, budget_bytes=2**62)
    llm.set_residency("offload")  # so that only the levels in use are in memory
    plans = {"weights native": Plan()}
    plans |= {f"weights {level}": plan for level, plan in weight_plans(llm)}
    plans |= {
        f"cache {cache}": Plan.uniform(llm.facts.num_layers, caches=cache)
        for cache in (settings.caches if llm.facts.kv_heads else [])
    }
    for name, plan in plans.items():
        llm.apply(plan)
        batch = batch_of(llm, request.batch_size, tokens)
        parts = memory.breakdown(plan, request)
        predicted = parts.weights + parts.stubs + parts.embeddings + parts.kv_cache
        measured = llm.held_bytes.weights + batch.kv_bytes
        batch.close()
        rows[name] = {
            "predicted_bytes": predicted,
            "held_bytes": measured,
            "difference_bytes": predicted - measured,
        }
    llm.apply(Plan())
    return rows


def _freeing(llm: ElasticLLM) -> dict[str, dict[str, Any]]:
    """Memory of the process that lower weights free, and the bytes that they should."""
    from rap_env.runtime.memory_meter import process_meter

    llm.set_residency("offload")
    meter, memory = process_meter(llm, reset_mark=True), MemoryModel(llm)
    request = Request(1, 1, budget_bytes=2**62)
    rows: dict[str, dict[str, Any]] = {}
    for level, plan in weight_plans(llm):
        llm.apply(plan)  # makes the level, once
        llm.apply(Plan())
        native, lowered = (memory.breakdown(p, request) for p in (Plan(), plan))
        predicted = native.peak - native.workspace - lowered.peak + lowered.workspace
        before = meter.used_bytes()
        change_s = seconds_of(lambda: llm.apply(plan))  # noqa: B023
        freed = before - meter.used_bytes()
        llm.apply(Plan())
        rows[level] = {
            "predicted_bytes": predicted,
            "freed_bytes": freed,
            "difference_percent": 100 * (freed - predicted) / predicted,
            "change_s": change_s,
        }
    return rows


if __name__ == "__main__":
    launch(LevelsSettings, main)

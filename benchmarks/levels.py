"""Levels and masks that change while the model generates: ``python -m benchmarks.levels``.

Record ``levels``: decode steps and prefills of the model with packed weights and of the same model
unquantised run in turn, and so do decode steps with a quantised and an unquantised cache; then all
levels of a running batch change at once. Record ``live``: the time of removing blocks relative to a
decode step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from benchmarks.measuring import ModelSettings, alternate, open_model, ratios, seconds_of, spread
from benchmarks.record import Target, write_record
from experiments.config.common import parse_shape
from experiments.study.console import run_with_settings
from rap_env.levels import WeightLevel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan

_DECODE_AT_MOST = {1: 0.85, 8: 1.0}
_FEW_BITS_AT_MOST = {1: 1.5, 8: 1.25}
_PREFILL_AT_MOST, _FEW_BITS_PREFILL_AT_MOST, _CACHE_AT_MOST, _CHANGE_AT_MOST = 1.15, 1.2, 1.3, 3.0

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
    few_bits: str = "int3"
    """Level of all FFN blocks beside the packed weights as they are."""
    cache_request: str = "8x2048"
    """Rows x tokens of its decode step."""
    steps: int = 8
    """Decode steps in one measurement."""
    blocks: int = 20
    """Random blocks that are removed and restored."""


def main(settings: LevelsSettings) -> None:
    """Measure, and write both records."""
    wide = open_model(settings, weights="bf16")
    measure_levels(wide, settings)
    measure_masks(wide, settings)


def measure_levels(wide: ElasticLLM, settings: LevelsSettings) -> None:
    """Compare levels with those of an unquantised model, and write the record ``levels``."""
    packed = open_model(settings, weights=settings.packed)
    wide_weights, targets = f"{wide.facts.dtype} weights", []

    def compare(what: str, sides: Measured, calls: int, at_most: float, against: str) -> Measured:
        compared = _compared(sides, settings.repeats, calls)
        what = f"times the time of a {what}"
        targets.append(Target.of(what, compared["ratio"], at_most=at_most, against=against))
        return compared

    def compare_models(
        pair: Mapping[str, ElasticLLM],
        what: str,
        steps_at_most: Mapping[int, float],
        prefill_at_most: float,
        against: str,
    ) -> Measured:
        tokens, made = settings.context_tokens, {}
        for rows in settings.rows:
            made[f"{rows}_rows"] = compare(
                f"decode step of {rows} row{'s' * (rows > 1)}, {what}",
                {n: _stepping(batch_of(m, rows, tokens), settings.steps) for n, m in pair.items()},
                settings.steps, steps_at_most.get(rows, steps_at_most[8]), against,
            )  # fmt: skip
        prefills = {name: partial(batch_of, llm, 1, tokens) for name, llm in pair.items()}
        what = f"prefill of {tokens} tokens, {what}"
        made["prefill"] = compare(what, prefills, 1, prefill_at_most, against)
        return made

    decode = compare_models(
        {"new": packed, "old": wide}, "weights packed", _DECODE_AT_MOST, _PREFILL_AT_MOST,
        wide_weights,
    )  # fmt: skip
    measured = {"prefill": decode.pop("prefill"), "decode": decode, "cache": {}, "few_bits": {}}
    lowered = open_model(settings, weights=settings.packed)
    having = lowered.facts.blocks_at(cast("WeightLevel", settings.few_bits))
    lowered.apply(Plan.of({name: n for name, n in having.items() if name.endswith("ffn")}))
    if having:
        measured["few_bits"] = compare_models(
            {"new": lowered, "old": packed}, f"FFN weights at {settings.few_bits}",
            _FEW_BITS_AT_MOST, _FEW_BITS_PREFILL_AT_MOST, "packed weights",
        )  # fmt: skip
    for name, sides in _cache_sides(settings):
        measured["cache"][name] = compare(
            f"decode step of {settings.cache_request} tokens, cache in {settings.cache}",
            sides, settings.steps, _CACHE_AT_MOST, f"a {wide.facts.dtype} cache, {name}",
        )  # fmt: skip
    change = measured["change"] = _changing(wide, all_lowered(wide), settings)
    targets.append(
        Target.of(
            "decode steps that a change of the levels of all weights and caches takes",
            change["ratio"],
            at_most=_CHANGE_AT_MOST,
            against=f"a decode step: {1000 * change['step_s']['median']:.1f} ms",
        )
    )
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
            "have been in use.",
        ],
    )


def measure_masks(llm: ElasticLLM, settings: LevelsSettings) -> None:
    """Remove and restore random blocks of a running batch, and write the record ``live``."""
    drawn = random.Random(0).sample(range(llm.num_blocks), llm.num_blocks)
    mask = Plan.removing(*drawn[: settings.blocks])
    switch = _changing(llm, mask, settings)
    percent = {n: v if n == "repeats" else 100 * v for n, v in switch["ratio"].items()}
    targets = [
        Target.of(
            "% of a decode step that removing blocks takes, their keys and values included",
            percent,
            at_most=2.0,
            against=f"a dense decode step: {1000 * switch['step_s']['median']:.1f} ms",
        )
    ]
    write_record(
        "live",
        device=str(llm.device),
        settings=settings,
        targets=targets,
        measured={"switch": switch},
        notes=[
            f"{llm.facts.dtype}; {settings.blocks} random blocks with resident weights; "
            f"{settings.context_tokens} tokens of context.",
        ],
    )


def batch_of(
    llm: ElasticLLM,
    rows: int,
    tokens: int,
    reserve_tokens: int = 0,
) -> LiveBatch:
    """A batch whose cache holds `tokens` random tokens of each row."""
    drawn = random.Random(rows)
    batch = LiveBatch(llm)
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
    rows, tokens = parse_shape(settings.cache_request)
    room = settings.steps * (settings.repeats + 1)

    def side(cache: str, reserve_tokens: int) -> Callable[[], None]:
        model = open_model(settings, weights=settings.packed)
        model.apply(Plan.uniform(model.facts.num_layers, caches=cache))
        batch = batch_of(model, rows, max(1, tokens - room // 2), reserve_tokens)
        return _stepping(batch, settings.steps)

    for name, reserve_tokens in (("copied", 0), ("with room", tokens + room)):
        yield name, {"old": side("native", reserve_tokens), "new": side(settings.cache, 0)}


def _changing(llm: ElasticLLM, plan: Plan, settings: LevelsSettings) -> dict[str, Any]:
    """Seconds of applying a plan under a running batch, in decode steps before it."""
    change_s, step_s, back_s = [], [], []
    for _ in range(settings.repeats + 1):  # the first one makes the levels
        batch = batch_of(llm, 1, settings.context_tokens)
        step_s.append(seconds_of(_stepping(batch, settings.steps)) / settings.steps)
        change_s.append(seconds_of(lambda: llm.apply(plan)))
        back_s.append(seconds_of(lambda: llm.apply(Plan())))
        batch.close()
    return {
        "ratio": ratios(change_s[1:], step_s[1:]),
        "change_s": spread(change_s[1:]),
        "back_s": spread(back_s[1:]),
        "step_s": spread(step_s[1:]),
        "first_change_s": change_s[0],
    }


def all_lowered(llm: ElasticLLM) -> Plan:
    """Every item at int4 (embeddings at int8), as far as the model has these levels."""
    facts = llm.facts
    levels = facts.blocks_at("int4")
    if "int8" in facts.embedding_levels:
        levels["embeddings"] = "int8"
    caches = Plan.uniform(facts.num_layers, caches="int4").levels if facts.kv_heads else {}
    return Plan.of({**levels, **caches})


if __name__ == "__main__":
    run_with_settings(LevelsSettings, main)

"""Measures what each level of each item costs alone, and what uniform levels cost together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rap_env.blocks import block_name
from rap_env.importance.level_costs import CACHE_LEVELS, LevelCosts, window_share
from rap_env.levels import CacheLevel
from rap_env.llm.progress import progress_bar
from rap_env.memory import ModelFacts
from rap_env.plan import EMBEDDINGS, CompressionPlan, cache_name
from rap_env.scoring.scorer import MaskScorer, bar_callback


def scan_levels(
    scorer: MaskScorer, cache_levels: Sequence[str] = CACHE_LEVELS, *, progress: bool = True
) -> LevelCosts:
    """Measure every level of every item alone, and each level of all blocks or all caches at once.

    Windows that hold whole windows of the text are left out: they change nothing there.

    Raises:
        UnknownNameError: There is no such level of a cache.
    """
    facts, length = scorer.llm.facts, int(scorer.corpus.tokens.shape[1])
    single = one_shot_plans(facts, useful_levels(cache_levels, length))
    empty = LevelCosts(
        num_layers=facts.num_layers,
        window_tokens=length,
        native_nll=0.0,
        one_shot={},
        joint={},
        evaluations=0,
        evaluations_run=0,
        block_forwards=0.0,
        seconds=0.0,
        provenance=scorer.provenance,
    )
    uniform = uniform_plans(single)
    plans = [CompressionPlan(), *_plans_of(single), *uniform]
    costs, nll = _measured(empty, scorer, plans, progress)
    native = nll[0]
    rises = iter(value - native for value in nll[1:])
    one_shot = {item: {level: next(rises) for level in levels} for item, levels in single.items()}
    joint = {plan.to_json(): next(rises) for plan in uniform}
    return replace(costs, native_nll=native, one_shot=one_shot, joint=joint)


def measure_jointly(
    costs: LevelCosts,
    scorer: MaskScorer,
    plans: Sequence[CompressionPlan],
    *,
    progress: bool = True,
) -> LevelCosts:
    """Add measured plans, such as those that a policy chooses, to the level costs."""
    found, nll = _measured(costs, scorer, [CompressionPlan(), *plans], progress)
    rises = {p.to_json(): value - nll[0] for p, value in zip(plans, nll[1:], strict=True)}
    return replace(found, joint={**costs.joint, **rises})


def useful_levels(cache_levels: Sequence[str], tokens: int) -> list[str]:
    """The levels of caches that differ from others on sequences of `tokens` tokens."""
    levels = [CacheLevel.of(name) for name in cache_levels]
    return [c.name for c in levels if c.window_tokens is None or window_share(c, tokens) > 0]


def one_shot_plans(facts: ModelFacts, cache_levels: Sequence[str]) -> dict[str, list[str]]:
    """The levels of each item that are measured alone, by names, native ones left out."""
    found: dict[str, list[str]] = {}
    for index in range(facts.num_blocks):
        found[block_name(index)] = [n for n in facts.weight_levels(index) if n != "native"]
    if facts.kv_heads:
        found |= {cache_name(layer): list(cache_levels) for layer in range(facts.num_layers)}
    return found | {EMBEDDINGS: [n for n in facts.embedding_levels if n != "native"]}


def uniform_plans(levels: dict[str, list[str]]) -> list[CompressionPlan]:
    """Plans with one level for all caches, and with one for all blocks; removal is left out."""
    plans = []
    caches = {item for item in levels if item.endswith(".cache")}
    for items in (caches, set(levels) - caches - {EMBEDDINGS}):
        names = dict.fromkeys(n for item in levels if item in items for n in levels[item])
        for name in names:
            lowered = [item for item in levels if item in items and name in levels[item]]
            if name != "removed" and len(lowered) > 1:
                plans.append(CompressionPlan.of(dict.fromkeys(lowered, name)))
    return plans


def _plans_of(levels: dict[str, list[str]]) -> list[CompressionPlan]:
    return [CompressionPlan.of({item: n}) for item, names in levels.items() for n in names]


def _measured(
    costs: LevelCosts, scorer: MaskScorer, plans: list[CompressionPlan], progress: bool
) -> tuple[LevelCosts, list[float]]:
    """NLL of plans, nats per token, and the costs with what measuring them took added."""
    began = time.perf_counter()
    before = scorer.evaluations, scorer.block_forwards
    with progress_bar(progress, total=len(set(plans)), desc="levels", unit="plan") as bar:
        nll = scorer.nll_many(plans, bar_callback(bar))
    spent = replace(
        costs,
        evaluations=costs.evaluations + len(set(plans)),
        evaluations_run=costs.evaluations_run + scorer.evaluations - before[0],
        block_forwards=costs.block_forwards + scorer.block_forwards - before[1],
        seconds=costs.seconds + time.perf_counter() - began,
    )
    return spent, nll

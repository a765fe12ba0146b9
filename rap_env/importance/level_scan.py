"""One-shot measurements: what each level of each item costs alone, and uniform levels together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.importance.level_costs import (
    CACHE_LEVELS,
    LevelCosts,
    is_as_exact,
    ordered_costs,
    window_share,
)
from rap_env.importance.profiles import ScoringMeter
from rap_env.levels import CacheLevel
from rap_env.model_facts import ModelFacts
from rap_env.models.progress import progress_bar
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name, is_cache
from rap_env.scoring.interface import bar_callback
from rap_env.scoring.scorer import PlanScorer

_ByItem = dict[str, dict[str, float]]

_Groups = Mapping[tuple[str, str], list[str]]
"""The items that have a level, by their kind and the level."""

TOGETHER = ("int8", "int4", "int4-window512", "int4-window128")
"""Levels of caches that are measured only for all caches at once.

On two windows of 1,024 tokens the costs of int4 in one layer of the default model had no
correlation between the windows (-0.1): they are below the noise.
"""

_FACTOR_RANGE = 0.1, 10.0

Rise = npt.NDArray[np.float64]
"""Rise in NLL on each window of a text, nats per token, (windows,)."""


def scan_levels(
    scorer: PlanScorer,
    cache_levels: Sequence[str] = CACHE_LEVELS,
    *,
    together: Collection[str] = TOGETHER,
    progress: bool = True,
) -> LevelCosts:
    """Measure every level of every item alone, and each level of all blocks or all caches at once.

    Windows that hold whole windows of the text are left out: they change nothing there.

    Args:
        scorer: Measures plans on the calibration text.
        cache_levels: Names of levels of caches.
        together: Those of them that are only measured for all caches at once. Caches have
            shares in proportion to their costs at the first less exact level that is measured
            alone, else at the last more exact one, else equal ones.
        progress: Whether to show a progress bar.

    Raises:
        UnknownNameError: There is no such level of a cache.
    """
    facts, length = scorer.llm.facts, int(scorer.corpus.tokens.shape[1])
    levels = one_shot_plans(facts, useful_levels(cache_levels, length))
    uniform = uniform_plans(levels)
    single = {
        item: [n for n in names if not (is_cache(item) and n in together)]
        for item, names in levels.items()
    }
    alone = [Plan.of({item: n}) for item, names in single.items() for n in names]
    spent, rises = _measured(scorer, [*alone, *uniform.values()], progress)
    left = iter(rises)
    measured = {item: {n: next(left) for n in names} for item, names in single.items()}
    joint = {pair: float(next(left).mean()) for pair in uniform}
    one_shot = {i: {n: float(r.mean()) for n, r in m.items()} for i, m in measured.items()}
    errors = {i: {n: _standard_error(r) for n, r in m.items()} for i, m in measured.items()}
    caches = [item for item in levels if is_cache(item)]
    for level in (n for n in (levels[caches[0]] if caches else []) if n in together):
        shares = _shares(level, caches, single[caches[0]], one_shot, errors)
        for item, share in zip(caches, shares, strict=True):
            one_shot[item] |= {level: share * joint["caches", level]}
            errors[item] |= {level: 0.0}
    by_plan = {uniform[pair].to_json(): rise for pair, rise in joint.items()}
    return LevelCosts(
        num_layers=facts.num_layers,
        window_tokens=length,
        native_nll=scorer.nll(Plan()),
        costs=fitted_costs(one_shot, errors, by_plan),
        joint=by_plan,
        provenance=scorer.provenance,
        **spent,
    )


def _shares(
    level: str, caches: list[str], alone: list[str], one_shot: _ByItem, errors: _ByItem
) -> npt.NDArray[np.float64]:
    """Share of each cache in the cost of a level of all caches; `alone` were measured alone."""
    below = [n for n in alone if is_as_exact(caches[0], level, n)]
    above = [n for n in alone if is_as_exact(caches[0], n, level)]
    if proxies := below[:1] or above[-1:]:
        proxy = proxies[0]
        costs = shrunk_costs(
            [one_shot[item][proxy] for item in caches], [errors[item][proxy] for item in caches]
        )
        if costs.sum() > 0:
            return np.asarray(costs / costs.sum())
    return np.full(len(caches), 1 / len(caches))


def fitted_costs(one_shot: _ByItem, errors: _ByItem, joint: Mapping[str, float]) -> _ByItem:
    """Costs from measurements: without noise, in order, and scaled to the uniform plans."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item, levels in one_shot.items():
        for level in levels:
            groups.setdefault((_kind(item, level), level), []).append(item)
    alone = ordered_costs(without_noise(one_shot, errors, groups))
    factors = level_factors(alone, joint, groups)
    scaled = {
        item: {
            level: cost * factors.get(f"{_kind(item, level)} {level}", 1.0)
            for level, cost in levels.items()
        }
        for item, levels in alone.items()
    }
    return ordered_costs(scaled)


def without_noise(one_shot: _ByItem, errors: _ByItem, groups: _Groups) -> _ByItem:
    """The costs of each level, shrunk over the items that have it."""
    costs: _ByItem = {item: {} for item in one_shot}
    for (_, level), items in groups.items():
        shrunk = shrunk_costs(
            [one_shot[item][level] for item in items], [errors[item][level] for item in items]
        )
        for item, cost in zip(items, shrunk.tolist(), strict=True):
            costs[item][level] = cost
    return costs


def shrunk_costs(costs: Sequence[float], errors: Sequence[float]) -> npt.NDArray[np.float64]:
    """Costs pulled to their mean by the share of their variance that is noise, at least 0, (n,).

    Args:
        costs: Measured costs of a level for n items.
        errors: Their standard errors.
    """
    measured = np.array(costs)
    spread, noise = float(measured.var()), float(np.mean(np.square(errors)))
    kept = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    pulled: npt.NDArray[np.float64] = measured.mean() + kept * (measured - measured.mean())
    return np.maximum(pulled, 0.0)


def level_factors(alone: _ByItem, joint: Mapping[str, float], groups: _Groups) -> dict[str, float]:
    """Cost of the plan in which all items have a level, over the sum of the items' costs."""
    factors: dict[str, float] = {}
    for (kind, level), items in groups.items():
        uniform = joint.get(Plan.of(dict.fromkeys(items, level)).to_json())
        total = sum(alone[item][level] for item in items)
        if uniform is not None and len(items) > 1 and total > 0:
            factors[f"{kind} {level}"] = float(np.clip(uniform / total, *_FACTOR_RANGE))
    return factors


def _kind(item: str, level: str) -> str:
    """Items with one factor for a level: caches, blocks, or removed blocks of one kind."""
    if item == EMBEDDINGS:
        return item
    kind = item.partition(".")[2]
    return kind if kind == "cache" or level == "removed" else "block"


def measure_jointly(
    costs: LevelCosts,
    scorer: PlanScorer,
    plans: Sequence[Plan],
    *,
    progress: bool = True,
) -> LevelCosts:
    """Add measured plans, such as those that a policy chooses, to the level costs."""
    spent, rises = _measured(scorer, list(plans), progress)
    joint = {p.to_json(): float(rise.mean()) for p, rise in zip(plans, rises, strict=True)}
    return replace(costs, joint={**costs.joint, **joint}, **costs.with_added(spent))


def useful_levels(cache_levels: Sequence[str], tokens: int) -> list[str]:
    """The levels of caches that differ from others on sequences of `tokens` tokens."""
    levels = [CacheLevel.of(name) for name in cache_levels]
    return [c.name for c in levels if c.window_tokens is None or window_share(c, tokens) > 0]


def one_shot_plans(facts: ModelFacts, cache_levels: Sequence[str]) -> dict[str, list[str]]:
    """The levels of each item that are measured alone, by names, native ones left out."""
    levels: dict[str, list[str]] = {}
    for index in range(facts.num_blocks):
        levels[block_name(index)] = [n for n in facts.weight_levels(index) if n != "native"]
    if facts.kv_heads:
        levels |= {cache_name(layer): list(cache_levels) for layer in range(facts.num_layers)}
    return levels | {EMBEDDINGS: [n for n in facts.embedding_levels if n != "native"]}


def uniform_plans(levels: dict[str, list[str]]) -> dict[tuple[str, str], Plan]:
    """Plans with one level for all caches or all blocks, by ``caches`` or ``blocks`` and level.

    Removal of all blocks is left out.
    """
    plans = {}
    caches = {item for item in levels if is_cache(item)}
    for kind, items in (("caches", caches), ("blocks", set(levels) - caches - {EMBEDDINGS})):
        names = dict.fromkeys(n for item in levels if item in items for n in levels[item])
        for name in names:
            lowered = [item for item in levels if item in items and name in levels[item]]
            if name != "removed":
                plans[kind, name] = Plan.of(dict.fromkeys(lowered, name))
    return plans


def _standard_error(rise: Rise) -> float:
    return float(rise.std(ddof=1) / np.sqrt(len(rise))) if len(rise) > 1 else 0.0


def _measured(
    scorer: PlanScorer, plans: list[Plan], progress: bool
) -> tuple[dict[str, Any], list[Rise]]:
    """What measuring took, as fields of a profile, and the rise in NLL of each window."""
    meter = ScoringMeter(scorer)
    distinct = {Plan(), *plans}
    with progress_bar(progress, total=len(distinct), desc="levels", unit="plan") as bar:
        scorer.nll_many([Plan(), *plans], bar_callback(bar))
    spent, native = meter.spent(len(distinct)), scorer.window_nll(Plan())
    return spent, [scorer.window_nll(plan) - native for plan in plans]

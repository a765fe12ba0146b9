"""Fits costs of levels to measurements, in four steps. Without torch.

1. *Shrinkage* (`without_noise`). The costs of a level differ between layers, but part of that is
   noise of the text. They are pulled to their mean by the share of their variance that is noise.
2. *Order* (`in_order`). A level costs at least as much as each more exact level of the same item.
   This also keeps noise, such as a negative rise, from making a level look free.
3. *Factors* (`level_factors`, `removal_factors`). Lowering all caches costs more, or less, than the
   sum of lowering each one alone: each level has the ratio that was measured for its uniform plan.
   Removal has no such plan: its factors are fitted to all plans that remove blocks.
4. *Corrected costs* (`fit_costs`). Costs are multiplied by their factors; the removal of a block
   costs at least as much as any of its levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.plan import EMBEDDINGS, Plan, is_cache

Costs = dict[str, dict[str, float]]
"""Rises in NLL, nats per token, by names of items and levels."""

_Groups = Mapping[tuple[str, str], list[str]]
"""The items that have a level, by their kind and the level."""

_FACTOR_RANGE = 0.1, 10.0
_PULL = 0.2  # weight of the preference for factors of removal of 1


class FittedCosts(NamedTuple):
    """Costs of levels, and the factors that are in them.

    Attributes:
        costs: Costs of each level of each item.
        factors: Joint cost over the sum of one-shot costs, by kind of item and level, such as
            ``cache int4``, ``block int8`` and ``attn removed``. A level that was never measured
            jointly has none.
    """

    costs: Costs
    factors: dict[str, float]


def fit_costs(one_shot: Costs, errors: Costs, joint: Mapping[str, float]) -> FittedCosts:
    """Fit costs to measurements, which are those of `LevelCosts`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item, levels in one_shot.items():
        for level in levels:
            groups.setdefault((_kind(item, level), level), []).append(item)
    alone = in_order(without_noise(one_shot, errors, groups))
    factors = level_factors(alone, joint, groups)
    factors |= removal_factors(alone, joint, groups, factors)
    costs = {
        item: {
            level: cost * factors.get(f"{_kind(item, level)} {level}", 1.0)
            for level, cost in levels.items()
        }
        for item, levels in alone.items()
    }
    for item, levels in costs.items():
        if "removed" in levels:
            cache = costs.get(item.replace(".attn", ".cache"), {})
            levels["removed"] = max(*levels.values(), *cache.values(), 0.0)
    return FittedCosts(costs, factors)


def without_noise(one_shot: Costs, errors: Costs, groups: _Groups) -> Costs:
    """The costs of each level, shrunk over the items that have it."""
    costs: Costs = {item: {} for item in one_shot}
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


def in_order(costs: Costs) -> Costs:
    """Costs that are at least those of every more exact level of the item."""
    return {
        item: {
            level: max(cost for other, cost in levels.items() if is_as_exact(item, other, level))
            for level in levels
        }
        for item, levels in costs.items()
    }


def is_as_exact(item: str, exact: str, level: str) -> bool:
    """Whether one level of an item is at least as exact as another one."""
    if not is_cache(item):
        return WEIGHT_LEVELS.index(exact) <= WEIGHT_LEVELS.index(level)
    return CacheLevel.of(exact).lowest(CacheLevel.of(level)) == CacheLevel.of(level)


def level_factors(alone: Costs, joint: Mapping[str, float], groups: _Groups) -> dict[str, float]:
    """Cost of the plan in which all items have a level, over the sum of the items' costs."""
    factors: dict[str, float] = {}
    for (kind, level), items in groups.items():
        uniform = joint.get(Plan.of(dict.fromkeys(items, level)).to_json())
        total = sum(alone[item][level] for item in items)
        if uniform is not None and len(items) > 1 and total > 0:
            factors[f"{kind} {level}"] = float(np.clip(uniform / total, *_FACTOR_RANGE))
    return factors


def removal_factors(
    alone: Costs, joint: Mapping[str, float], groups: _Groups, others: Mapping[str, float]
) -> dict[str, float]:
    """Factors of removal that minimise the relative errors of all plans that remove blocks.

    Least squares with a preference for 1. `others` are the factors of the other levels.
    """
    kinds = sorted(group for group in groups if group[1] == "removed")
    rows, targets = [], []
    for text, measured in sorted(joint.items()):
        levels = Plan.from_json(text).levels
        if measured <= 0 or "removed" not in levels.values():
            continue
        sums, rest = dict.fromkeys(kinds, 0.0), measured
        for item, level in levels.items():
            group = _kind(item, level), level
            if group in sums:
                sums[group] += alone[item][level]
            else:
                rest -= alone[item][level] * others.get(" ".join(group), 1.0)
        rows.append([total / measured for total in sums.values()])
        targets.append(rest / measured)
    if not rows:
        return {}
    # One more row for each factor pulls it to 1.
    matrix = np.array([*rows, *(_PULL * np.eye(len(kinds)))])
    solved = np.linalg.lstsq(matrix, np.array([*targets, *[_PULL] * len(kinds)]), rcond=None)[0]
    values = np.clip(solved, *_FACTOR_RANGE).tolist()
    return {" ".join(group): value for group, value in zip(kinds, values, strict=True)}


def _kind(item: str, level: str) -> str:
    """Items with one factor for a level: caches, blocks, or removed blocks of one kind."""
    if item == EMBEDDINGS:
        return item
    kind = item.partition(".")[2]
    return kind if kind == "cache" or level == "removed" else "block"

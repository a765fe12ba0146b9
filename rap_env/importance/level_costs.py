"""One-shot costs of levels: the rise in NLL if a single item is lowered. Without torch.

A plan's rise in NLL is predicted as the sum of the costs of its levels, which `fit_costs`
fits to the measurements. Two things are special:

- *Shares.* Levels of caches that cost less than noise alone are measured for all caches at
  once, and shared among the layers in proportion to the costs of a similar level
  (`TOGETHER`).
- *Windows.* A window costs nothing at tokens that still see everything. Its measured cost is
  spread over the tokens that see less, so it grows with the length of the sequence
  (`window_share`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.profiles import OneShotProfile, Profile
from rap_env.levels import GROUP_TOKENS, NATIVE_CACHE, SINK_GROUPS, WEIGHT_LEVELS, CacheLevel
from rap_env.model_facts import HasFacts
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name, is_cache, item_names

CACHE_LEVELS = (
    "int8",
    "int4",
    "int2",
    "int4-window512",
    "int4-window256",
    "int4-window128",
)
"""Levels of caches that are measured unless others are asked for."""

TOGETHER = ("int8", "int4", "int4-window512", "int4-window128")
"""Levels of caches that are measured only for all caches at once.

On two windows of 1,024 tokens the costs of int4 in one layer of the default model had no
correlation between the windows (-0.1): they are below the noise. Those of int2 and of windows
had 0.6 to 0.76. Those of a window of 512 and of 256 tokens had 0.94 with each other.
"""

UNQUANTISED = "unquantised"
"""The format of native weights that are not packed, as in `ModelFacts.weights`."""


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
            ``cache int4``, ``block int8`` and ``attn removed``. A level that was never
            measured jointly has none.
    """

    costs: Costs
    factors: dict[str, float]


def fit_costs(one_shot: Costs, errors: Costs, joint: Mapping[str, float]) -> FittedCosts:
    """Fit costs to measurements, which are those of `LevelCosts`, in four steps.

    1. *Shrinkage* (`without_noise`). The costs of a level differ between layers, but part of
    that
       is noise of the text. They are pulled to their mean by the share of their variance that
       is noise.
    2. *Order* (`in_order`). A level costs at least as much as each more exact level of the
    same
       item. This also keeps noise, such as a negative rise, from making a level look free.
    3. *Factors* (`level_factors`, `removal_factors`). Lowering all caches costs more, or
    less, than
       the sum of lowering each one alone: each level has the ratio that was measured for its
       uniform plan. Removal has no such plan: its factors are fitted to all plans that remove
       blocks.
    4. *Corrected costs*. Costs are multiplied by their factors; the removal of a block costs
    at
       least as much as any of its levels.
    """
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


@dataclass(frozen=True, kw_only=True)
class LevelCosts(Profile):
    """Costs of the levels of one model's items (L layers), measured on one text.

    Attributes:
        num_layers: L.
        window_tokens: Tokens of a window of the text: the length at which caches were
            measured.
        native_nll: NLL of the native model, nats per token.
        one_shot: Rise in NLL if only this item has this level, nats per token; by names of
            items and levels. Levels that are missing were not measured, and no policy chooses
            them. The costs of `TOGETHER` are shares of the measured uniform plan.
        errors: Standard error of each of them over the windows, in the same form; 0 for
            shares.
        joint: Rise in NLL of plans that lower several items, nats per token, by their JSON.
    """

    KIND = "level costs"
    FORMAT = 1

    num_layers: int
    window_tokens: int
    native_nll: float
    one_shot: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]
    joint: dict[str, float]

    def __post_init__(self) -> None:
        if unknown := set(self.one_shot) - set(item_names(self.num_layers)):
            raise ArtifactError(
                f"Level costs of a model with {self.num_layers} layers name the item "
                f"{sorted(unknown)[0]!r}, which it does not have."
            )

    @classmethod
    def of_removals(cls, profile: OneShotProfile) -> Self:
        """The costs of a ladder that only removes blocks, from their one-shot importance."""
        rises = {block_name(n): {"removed": r} for n, r in enumerate(profile.delta_nll.tolist())}
        names = ("evaluations", "evaluations_run", "block_forwards", "seconds", "provenance")
        return cls(
            num_layers=len(rises) // 2,
            window_tokens=profile.provenance["text"]["window_tokens"],
            native_nll=profile.dense_nll,
            one_shot=rises,
            errors={item: {"removed": 0.0} for item in rises},
            joint={},
            **{name: getattr(profile, name) for name in names},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or of another model or format of its
                weights.
        """
        costs = super().load(path, model)
        costs.check_weights(path, model)
        return costs

    def check_weights(self, path: str | os.PathLike[str], model: HasFacts) -> None:
        """Check that costs in a file were measured with the format of a model's weights.

        Raises:
            ArtifactError: They were measured with another one.
        """
        measured = self.provenance["scoring"].get("weights", UNQUANTISED)
        if measured != model.facts.weights:
            raise ArtifactError(
                f"{os.fspath(path)} was measured with {measured} weights, but those of "
                f"{model.facts.name} are {model.facts.weights}."
            )

    @cached_property
    def cache_levels(self) -> tuple[CacheLevel, ...]:
        """The levels of caches that were measured, with the native one first."""
        caches = (self.one_shot.get(cache_name(n), {}) for n in range(self.num_layers))
        names = dict.fromkeys(level for costs in caches for level in costs)
        return (NATIVE_CACHE, *map(CacheLevel.of, names))

    @cached_property
    def fitted(self) -> FittedCosts:
        """The costs that predictions add up, with their factors."""
        return fit_costs(self.one_shot, self.errors, self.joint)

    def cost(self, item: str, level: str, seq_len_tokens: int | None = None) -> float:
        """Rise in NLL if an item has a level, with the level's factor, nats per token, at least 0.

        A window that holds the whole sequence costs what its precision costs.

        Args:
            item: Name of the item.
            level: Name of the level; 0 for ``native``.
            seq_len_tokens: Length of the sequences; None is the length of the measured
                windows.

        Raises:
            UnknownNameError: The level was not measured for this item.
        """
        costs, known = self.fitted.costs.get(item, {}), level
        if level not in costs:
            if is_cache(item):
                known = _level_at(CacheLevel.of(level), seq_len_tokens or self.window_tokens).name
            if known == "native":
                return 0.0
            if known not in costs:
                raise UnknownNameError(f"measured level of {item}", known, ["native", *costs])
        if seq_len_tokens is None or not is_cache(item):
            return costs[known]
        return self._cost_at(costs, CacheLevel.of(known), seq_len_tokens)

    def _cost_at(self, costs: Mapping[str, float], level: CacheLevel, tokens: int) -> float:
        """The cost of a level of a cache, of these costs, for sequences of `tokens` tokens."""
        cost = costs[level.name]
        if level.window_tokens is None:
            return cost
        measured = window_share(level, self.window_tokens)
        if not measured:
            raise ArtifactError(
                f"The cost of {level.name} was measured at {self.window_tokens} tokens, where it "
                "still holds everything; measure it with longer windows of text."
            )
        exact = min(cost, costs.get(CacheLevel(level.bits).name, 0.0))  # without a window
        return exact + (cost - exact) * window_share(level, tokens) / measured

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float:
        """Predicted rise in NLL of a plan: the sum of the costs of its levels, nats per token.

        Raises:
            UnknownNameError: A level of the plan was not measured.
        """
        levels = plan.levels.items()
        return sum(self.cost(item, level, seq_len_tokens) for item, level in levels)

    def predictions(self) -> list[dict[str, Any]]:
        """Predicted and measured rise in NLL of every plan that was measured jointly."""
        return [
            {
                "predicted": self.delta_nll(plan := Plan.from_json(text)),
                "measured": measured,
                "plan": str(plan),
                "levels": plan.levels,
            }
            for text, measured in self.joint.items()
        ]


class RemovalCosts(LevelCosts):
    """Costs of removals as they were measured: one that lowers the NLL stays below 0."""

    @cached_property
    def fitted(self) -> FittedCosts:
        """The measurements."""
        return FittedCosts(self.one_shot, {})


def _level_at(level: CacheLevel, tokens: int) -> CacheLevel:
    """A level without its window, if that holds the whole of a sequence."""
    return level if window_share(level, tokens) else CacheLevel(level.bits)


def window_share(level: CacheLevel, tokens: int) -> float:
    """Share of a sequence's tokens for which a window hides something, from 0 to 1.

    A token sees its own group, the window's groups before it, and the sinks.
    """
    if level.window_tokens is None:
        return 0.0
    whole = GROUP_TOKENS * (level.window_tokens // GROUP_TOKENS + SINK_GROUPS + 1)
    return max(0, tokens - whole) / tokens

"""One-shot costs of levels: the rise in NLL if a single item is lowered. Without torch.

A plan's rise in NLL is predicted as the sum of the costs of its levels. Corrections make the
sums useful:

- *Shrinkage.* The costs of a level differ between layers, but part of that is noise of the text.
  They are pulled to their mean by the share of their variance that is noise. Levels that cost
  less than noise alone are measured for all caches at once, and shared among the layers in
  proportion to the costs of a similar level (`TOGETHER`).
- *Order.* A level costs at least as much as each more exact level of the same item, and the
  removal of a block at least as much as any of its levels. This also keeps noise, such as a
  negative rise, from making a level look free.
- *Factors.* Lowering all 30 caches costs more, or less, than the sum of lowering each one alone.
  Each level's costs are multiplied by the ratio that was measured for it (`LevelCosts.factors`).
- *Windows.* A window costs nothing at tokens that still see everything. Its measured cost is
  spread over the tokens that see less, so it grows with the length of the sequence
  (`window_share`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rap_env.blocks import block_name
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.profiles import OneShotProfile, Profile
from rap_env.levels import GROUP_TOKENS, NATIVE_CACHE, SINK_GROUPS, WEIGHT_LEVELS, CacheLevel
from rap_env.model_facts import HasFacts
from rap_env.plan import EMBEDDINGS, Plan, cache_name, is_cache, item_names

CACHE_LEVELS = (
    "int8", "int4", "int2", "int4-window512", "int4-window256", "int4-window128",
)  # fmt: skip
"""Levels of caches that are measured unless others are asked for."""

TOGETHER = ("int8", "int4", "int4-window512", "int4-window128")
"""Levels of caches that are measured only for all caches at once.

On two windows of 1,024 tokens the costs of int4 in one layer of the default model had no
correlation between the windows (-0.1): they are below the noise. Those of int2 and of windows had
0.6 to 0.76. Those of a window of 512 and of 256 tokens had 0.94 with each other.
"""

UNQUANTISED = "unquantised"
"""The format of native weights that are not packed, as in `ModelFacts.weights`."""

_FACTOR_RANGE = 0.1, 10.0
_PULL = 0.2  # weight of the preference for factors of removal of 1


@dataclass(frozen=True, kw_only=True)
class LevelCosts(Profile):
    """Costs of the levels of one model's items (L layers), measured on one text.

    Attributes:
        num_layers: L.
        window_tokens: Tokens of a window of the text: the length at which caches were measured.
        native_nll: NLL of the native model, nats per token.
        one_shot: Rise in NLL if only this item has this level, nats per token; by names of items
            and levels. Levels that are missing were not measured, and no policy chooses them.
            The costs of `TOGETHER` are shares of the measured uniform plan.
        errors: Standard error of each of them over the windows, in the same form; 0 for shares.
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
            ArtifactError: It is truncated, altered, or of another model or format of its weights.
        """
        found = super().load(path, model)
        found.check_weights(path, model)
        return found

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
    def factors(self) -> dict[str, float]:
        """Measured joint cost over the sum of one-shot costs, by kind of item and level.

        Keys are such as ``cache int4``, ``block int8`` and ``attn removed``. Levels of caches and
        weights have the ratio of their uniform plan. Removal has no such plan: its two factors
        are fitted to the relative errors of all plans that remove blocks, by least squares with a
        preference for 1. A level that was never measured jointly has no factor.
        """
        found: dict[str, float] = {}
        for (kind, level), items in self._groups.items():
            joint = self._uniform(level, items)
            total = sum(self._alone[item][level] for item in items)
            if joint is not None and total > 0:
                found[f"{kind} {level}"] = float(np.clip(joint / total, *_FACTOR_RANGE))
        return found | self._removal_factors(found)

    def _uniform(self, level: str, items: list[str]) -> float | None:
        """Measured rise in NLL if all items of a group have a level; None for a single item."""
        plan = Plan.of(dict.fromkeys(items, level))
        return self.joint.get(plan.to_json()) if len(items) > 1 else None

    def _removal_factors(self, others: dict[str, float]) -> dict[str, float]:
        kinds = sorted(group for group in self._groups if group[1] == "removed")
        rows, wanted = [], []
        for text, measured in sorted(self.joint.items()):
            levels = Plan.from_json(text).levels
            if measured <= 0 or "removed" not in levels.values():
                continue
            sums = dict.fromkeys(kinds, 0.0)
            rest = measured
            for item, level in levels.items():
                group = _kind(item, level), level
                if group in sums:
                    sums[group] += self._alone[item][level]
                else:
                    rest -= self._alone[item][level] * others.get(" ".join(group), 1.0)
            rows.append([total / measured for total in sums.values()])
            wanted.append(rest / measured)
        if not rows:
            return {}
        # One more row for each factor pulls it to 1.
        matrix = np.array([*rows, *(_PULL * np.eye(len(kinds)))])
        solved = np.linalg.lstsq(matrix, np.array([*wanted, *[_PULL] * len(kinds)]), rcond=None)[0]
        values = np.clip(solved, *_FACTOR_RANGE).tolist()
        return {
            f"{kind} {level}": value for (kind, level), value in zip(kinds, values, strict=True)
        }

    @cached_property
    def _alone(self) -> dict[str, dict[str, float]]:
        """One-shot costs without noise, and at least those of every more exact level."""
        single: dict[str, dict[str, float]] = {item: {} for item in self.one_shot}
        for (_, level), items in self._groups.items():
            costs = shrunk_costs(
                [self.one_shot[item][level] for item in items],
                [self.errors[item][level] for item in items],
            )
            for item, cost in zip(items, costs.tolist(), strict=True):
                single[item][level] = cost
        return {
            item: {
                level: max(cost for other, cost in costs.items() if is_as_exact(item, other, level))
                for level in costs
            }
            for item, costs in single.items()
        }

    @cached_property
    def _corrected(self) -> dict[str, dict[str, float]]:
        """One-shot costs with their factors; removal costs at least as much as any level."""
        found = {
            item: {
                level: cost * self.factors.get(f"{_kind(item, level)} {level}", 1.0)
                for level, cost in costs.items()
            }
            for item, costs in self._alone.items()
        }
        for item, costs in found.items():
            if "removed" in costs:
                cache = found.get(item.replace(".attn", ".cache"), {})
                costs["removed"] = max(*costs.values(), *cache.values(), 0.0)
        return found

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[str]]:
        """The items that have a level, by their kind and the level."""
        found: dict[tuple[str, str], list[str]] = {}
        for item, costs in self.one_shot.items():
            for level in costs:
                found.setdefault((_kind(item, level), level), []).append(item)
        return found

    def cost(self, item: str, level: str, seq_len_tokens: int | None = None) -> float:
        """Rise in NLL if an item has a level, with the level's factor, nats per token, at least 0.

        A window that holds the whole sequence costs what its precision costs.

        Args:
            item: Name of the item.
            level: Name of the level; 0 for ``native``.
            seq_len_tokens: Length of the sequences; None is the length of the measured windows.

        Raises:
            UnknownNameError: The level was not measured for this item.
        """
        if level == "native":
            return 0.0
        costs = self._corrected.get(item, {})
        if level not in costs and is_cache(item):
            tokens = self.window_tokens if seq_len_tokens is None else seq_len_tokens
            level = _level_at(CacheLevel.of(level), tokens).name
            if level == "native":
                return 0.0
        if level not in costs:
            raise UnknownNameError(f"measured level of {item}", level, ["native", *costs])
        cost = costs[level]
        if seq_len_tokens is None or not is_cache(item):
            return cost
        stored = CacheLevel.of(level)
        if stored.window_tokens is None:
            return cost
        measured = window_share(stored, self.window_tokens)
        if not measured:
            raise ArtifactError(
                f"The cost of {level} was measured at {self.window_tokens} tokens, where it still "
                "holds everything; measure it with longer windows of text."
            )
        precision = CacheLevel(stored.bits).name  # the same bits, without a window
        kept = 0.0 if precision not in costs else min(cost, costs[precision])
        return kept + (cost - kept) * window_share(stored, seq_len_tokens) / measured

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


def _kind(item: str, level: str) -> str:
    """Items with one factor for a level: caches, blocks, or removed blocks of one kind."""
    if item == EMBEDDINGS:
        return item
    kind = item.partition(".")[2]
    return kind if kind == "cache" or level == "removed" else "block"


def shrunk_costs(costs: Sequence[float], errors: Sequence[float]) -> npt.NDArray[np.float64]:
    """Costs pulled to their mean by the share of their variance that is noise, at least 0, (n,).

    Args:
        costs: Measured costs of a level for n items.
        errors: Their standard errors.
    """
    found = np.array(costs)
    spread, noise = float(found.var()), float(np.mean(np.square(errors)))
    kept = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    pulled: npt.NDArray[np.float64] = found.mean() + kept * (found - found.mean())
    return np.maximum(pulled, 0.0)


def is_as_exact(item: str, exact: str, level: str) -> bool:
    """Whether one level of an item is at least as exact as another one."""
    if not is_cache(item):
        return WEIGHT_LEVELS.index(exact) <= WEIGHT_LEVELS.index(level)
    return CacheLevel.of(exact).lowest(CacheLevel.of(level)) == CacheLevel.of(level)


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

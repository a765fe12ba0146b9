"""Costs of levels: the rise in NLL if a single item is lowered. Without torch.

A plan's rise in NLL is predicted as the sum of the costs of its levels. Windows are special: a
window costs nothing at tokens that still see everything. Its cost is spread over the tokens
that see less, so it grows with the length of the sequence (`window_share`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.profiles import OneShotProfile, Profile
from rap_env.levels import GROUP_TOKENS, NATIVE_CACHE, SINK_GROUPS, WEIGHT_LEVELS, CacheLevel
from rap_env.memory import HasFacts
from rap_env.paths import COSTS_FILE, prepared_dir
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name, is_cache, item_names

CACHE_LEVELS = (
    "int8",
    "int4",
    "int2",
    "int4-window512",
    "int4-window256",
    "int4-window128",
)
"""Levels of caches that costs are of unless others are asked for."""

UNQUANTISED = "unquantised"
"""The format of native weights that are not packed, as in `ModelFacts.weights`."""

Costs = dict[str, dict[str, float]]
"""Rises in NLL, nats per token, by names of items and levels."""


def ordered_costs(costs: Costs) -> Costs:
    """Costs that are at least those of every more exact level of the item, and at least 0.

    The removal of an attention block removes its cache, so it costs at least as much as each
    level of that.
    """
    ordered = {
        item: {
            level: max(0.0, *(c for other, c in levels.items() if is_as_exact(item, other, level)))
            for level in levels
        }
        for item, levels in costs.items()
    }
    for item, levels in ordered.items():
        if "removed" in levels:
            cache = ordered.get(item.replace(".attn", ".cache"), {})
            levels["removed"] = max(*levels.values(), *cache.values())
    return ordered


def is_as_exact(item: str, exact: str, level: str) -> bool:
    """Whether one level of an item is at least as exact as another one."""
    if not is_cache(item):
        return WEIGHT_LEVELS.index(exact) <= WEIGHT_LEVELS.index(level)
    return CacheLevel.of(exact).lowest(CacheLevel.of(level)) == CacheLevel.of(level)


def _exactness(item: str, level: str) -> tuple[float, int]:
    """A key that puts the most exact level of an item first."""
    if not is_cache(item):
        return WEIGHT_LEVELS.index(level), 0
    cache = CacheLevel.of(level)
    return -(cache.window_tokens or float("inf")), -cache.bits


@dataclass(frozen=True, kw_only=True)
class LevelCosts(Profile):
    """Costs of the levels of one model's items (L layers) on one text.

    Attributes:
        num_layers: L.
        window_tokens: Tokens of a window of the text: the length that costs of caches are of.
        native_nll: NLL of the native model, nats per token.
        costs: Rise in NLL if only this item has this level, nats per token; by names of items
            and levels. No policy chooses levels that are missing.
        joint: Measured rise in NLL of plans that lower several items, nats per token, by
            their JSON.
    """

    KIND = "level costs"
    FORMAT = 2

    num_layers: int
    window_tokens: int
    native_nll: float
    costs: Costs
    joint: dict[str, float]

    def __post_init__(self) -> None:
        if unknown := set(self.costs) - set(item_names(self.num_layers)):
            raise ArtifactError(
                f"Level costs of a model with {self.num_layers} layers name the item "
                f"{sorted(unknown)[0]!r}, which it does not have."
            )

    @classmethod
    def of_removals(cls, profile: OneShotProfile) -> Self:
        """The costs of a ladder that only removes blocks: their one-shot importance as measured.

        A removal that lowers the NLL costs less than 0.
        """
        rises = {block_name(n): {"removed": r} for n, r in enumerate(profile.delta_nll.tolist())}
        names = ("evaluations", "evaluations_run", "block_forwards", "seconds", "provenance")
        return cls(
            num_layers=len(rises) // 2,
            window_tokens=profile.provenance["text"]["window_tokens"],
            native_nll=profile.dense_nll,
            costs=rises,
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
        """Check that costs in a file are of the format of a model's weights.

        Raises:
            ArtifactError: They are of another one.
        """
        measured = self.provenance["scoring"].get("weights", UNQUANTISED)
        if measured != model.facts.weights:
            raise ArtifactError(
                f"{os.fspath(path)} was measured with {measured} weights, but those of "
                f"{model.facts.name} are {model.facts.weights}."
            )

    @cached_property
    def cache_levels(self) -> tuple[CacheLevel, ...]:
        """The levels of caches that have costs, with the native one first."""
        caches = (self.costs.get(cache_name(n), {}) for n in range(self.num_layers))
        names = dict.fromkeys(level for costs in caches for level in costs)
        return (NATIVE_CACHE, *map(CacheLevel.of, names))

    def cost(self, item: str, level: str, seq_len_tokens: int | None = None) -> float:
        """Rise in NLL if an item has a level, nats per token.

        A window that holds the whole sequence costs what its precision costs.

        Args:
            item: Name of the item.
            level: Name of the level; 0 for ``native``.
            seq_len_tokens: Length of the sequences; None is the length of the windows.

        Raises:
            UnknownNameError: The level has no cost for this item.
        """
        costs, known = self.costs.get(item, {}), level
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
            UnknownNameError: A level of the plan has no cost.
        """
        levels = plan.levels.items()
        return sum(self.cost(item, level, seq_len_tokens) for item, level in levels)

    def sums_by_level(self) -> dict[str, dict[str, float]]:
        """Predicted rise in NLL if all items of a kind have a level, by kind and level."""
        sums: dict[str, dict[str, float]] = {}
        for item in sorted(self.costs, key=lambda name: (name == EMBEDDINGS, is_cache(name), name)):
            kind = sums.setdefault(item.rpartition(".")[2], {})
            for level in sorted(self.costs[item], key=partial(_exactness, item)):
                kind[level] = kind.get(level, 0.0) + self.costs[item][level]
        return sums


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


def prepared_costs(model: HasFacts) -> LevelCosts | None:
    """The costs of a model that was prepared (`rap_env.importance.preparation`); else None.

    Costs of other levels than the model has are not returned, such as those of quick levels
    for a model that was loaded without.

    Raises:
        ArtifactError: They are damaged.
    """
    path = prepared_dir(model.facts.fingerprint) / COSTS_FILE
    if not path.is_file():
        return None
    costs = LevelCosts.load(path, model)
    same = costs.provenance["scoring"].get("calibration") == model.facts.calibration
    return costs if same else None

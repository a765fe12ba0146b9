"""One-shot costs of levels: the rise in NLL if a single item is lowered. Without torch.

A plan's rise in NLL is predicted as the sum of the costs of its levels, which
`rap_env.importance.level_fit` fits to the measurements. Two things are special:

- *Shares.* Levels of caches that cost less than noise alone are measured for all caches at once,
  and shared among the layers in proportion to the costs of a similar level (`TOGETHER`).
- *Windows.* A window costs nothing at tokens that still see everything. Its measured cost is
  spread over the tokens that see less, so it grows with the length of the sequence
  (`window_share`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from rap_env.blocks import block_name
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_fit import FittedCosts, fit_costs
from rap_env.importance.profiles import OneShotProfile, Profile
from rap_env.levels import GROUP_TOKENS, NATIVE_CACHE, SINK_GROUPS, CacheLevel
from rap_env.model_facts import HasFacts
from rap_env.plan import Plan, cache_name, is_cache, item_names

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
            seq_len_tokens: Length of the sequences; None is the length of the measured windows.

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

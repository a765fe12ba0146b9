"""Rewards: weighted sums of terms, which turn measurements of masks into numbers.

The environment measures, and only where a step pays: at the end of an episode, or at each step if
the reward says so. So many environments can have their masks scored together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.reward.terms import (
    COMPARED_TO,
    SCALES,
    TIMINGS,
    AccuracyReward,
    MeasuresAccuracy,
    Outcome,
    PerplexityReward,
    RewardTerm,
)
from rap_env.specs import check_settings, split_spec

__all__ = [
    "COMPARED_TO",
    "REWARDS",
    "SCALES",
    "TIMINGS",
    "AccuracyReward",
    "MeasuresAccuracy",
    "Outcome",
    "PerplexityReward",
    "Reward",
    "RewardTerm",
    "make_reward",
]


@dataclass(frozen=True)
class Reward:
    """A weighted sum of terms.

    Attributes:
        weighted: Terms with their weights.
    """

    weighted: tuple[tuple[float, RewardTerm], ...]

    @cached_property
    def pays_every_step(self) -> bool:
        """Whether each step pays, so that every mask on the way has to be measured."""
        return any(term.pays_every_step for _, term in self.weighted)

    @cached_property
    def relative_to(self) -> str | None:
        """The baseline whose loss has to be measured where an episode ends, or None."""
        named = (term.relative_to for _, term in self.weighted)
        return next((name for name in named if name is not None), None)

    def step(self, outcome: Outcome) -> dict[str, float]:
        """Each term's share of the reward by name; the reward is their sum.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        return {term.name: weight * term.step(outcome) for weight, term in self.weighted}

    def nothing(self) -> dict[str, float]:
        """The shares of a step that pays nothing."""
        return {term.name: 0.0 for _, term in self.weighted}


_OF_PERPLEXITY = tuple(entry.name for entry in fields(PerplexityReward))

REWARDS: dict[str, tuple[str, ...]] = {
    "perplexity": _OF_PERPLEXITY,
    "accuracy": (),
    "combined": ("weights", *_OF_PERPLEXITY),
}
"""Every reward with the settings it has."""

_COMBINED_WEIGHTS = {"perplexity": 1.0, "accuracy": 1.0}


def make_reward(spec: str | Mapping[str, Any], tasks: Callable[[], MeasuresAccuracy]) -> Reward:
    """The reward that a spec names.

    Args:
        spec: ``"perplexity"``, ``"accuracy"`` or ``"combined"``, or a dict with that ``name``
            and settings: those of `PerplexityReward`, and for ``combined`` the ``weights`` by
            term too (1 each by default; 0 leaves a term out).
        tasks: Gives what measures accuracies; called only where it is needed.

    Raises:
        UnknownNameError: There is no such reward, setting, timing, scale, baseline or term.
        InvalidRequestError: A weight, the cap or the offset is out of its range.
    """
    name, settings = split_spec(spec, "reward", REWARDS)
    check_settings(settings, f"the reward {name!r}", REWARDS[name])
    weights = settings.pop("weights", _COMBINED_WEIGHTS) if name == "combined" else {name: 1.0}
    _check_weights(weights)
    if name != "accuracy":
        perplexity = PerplexityReward(**settings)  # checks settings, used or not
    weighted: list[tuple[float, RewardTerm]] = []
    for term, weight in weights.items():
        if weight:
            kind = perplexity if term == "perplexity" else AccuracyReward(tasks())
            weighted.append((float(weight), kind))
    return Reward(tuple(weighted))


def _check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights of terms that there are not, negative ones, and nothing but zeros."""
    for term, weight in weights.items():
        if term not in _COMBINED_WEIGHTS:
            raise UnknownNameError("reward term", term, _COMBINED_WEIGHTS)
        if not 0 <= weight < math.inf:
            raise InvalidRequestError(
                f"The weight of the reward term {term!r} must be at least 0, not {weight!r}."
            )
    if not any(weights.values()):
        raise InvalidRequestError("The reward 'combined' needs a weight above 0 for some term.")

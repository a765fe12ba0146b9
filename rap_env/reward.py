"""Rewards: small classes that turn measurements of masks into numbers to be maximised.

The environment measures, and only where a step pays: at the end of an episode, or at each step if
the reward says so. So many environments can have their masks scored together.

Each class states its range, its baseline (the mask whose reward is 0), whether it is
deterministic, and what it gives when an episode fails (is truncated before the request fits).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.specs import check_settings, split_spec

TIMINGS = ("terminal", "dense")


class MeasuresAccuracy(Protocol):
    """Task accuracies of masks, such as `rap_env.scoring.tasks.TaskScorer`."""

    def mean_accuracy(self, mask: BlockMask) -> float:
        """Mean accuracy over the tasks, in [0, 1]."""


class Outcome(NamedTuple):
    """What a step that pays came to.

    Attributes:
        mask: The mask after the step.
        loss: Its NLL less the dense model's, nats per token; 0 for the dense model.
        loss_before: Loss of the mask before the step (the same one for an invalid action), or
            None if it was not measured.
        ends: The episode ends with this step, terminated or truncated.
    """

    mask: BlockMask
    loss: float
    loss_before: float | None
    ends: bool


class RewardTerm(ABC):
    """One reason to prefer a mask. A term of the whole reward, in its own unit."""

    name: ClassVar[str]
    range: ClassVar[tuple[float, float]]
    """Least and greatest return of an episode."""
    baseline: ClassVar[str] = "the dense model: no block removed gives 0"
    deterministic: ClassVar[bool] = True
    """The same masks always give the same rewards."""
    on_failure: ClassVar[str] = "what the mask reached is worth, as for an episode that fits"

    @property
    def pays_every_step(self) -> bool:
        """Whether each step pays, not only the one that ends an episode."""
        return False

    @abstractmethod
    def step(self, outcome: Outcome) -> float:
        """Reward of a step.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """


@dataclass(frozen=True)
class PerplexityReward(RewardTerm):
    """Minus the loss of the final mask: its NLL less the dense model's, in nats per token.

    The log of perplexity rather than perplexity: it adds up over steps, and a ruined model
    does not drown all other episodes. With ``timing="dense"`` each step pays the NLL that its
    removal adds; with ``"terminal"`` the last step pays the whole. Undiscounted, both give the
    same return, since the differences telescope; the dense one tells the agent sooner which
    removal hurt, the terminal one costs one model evaluation an episode and not one a step.

    Attributes:
        timing: ``"terminal"`` (default: an episode removes 10 to 30 blocks, so it is that much
            cheaper) or ``"dense"``.
        loss_cap: Losses above it count as this many nats per token; None for no cap (default:
            the return is then exactly minus the loss). Random masks reach 10 and more, where
            the text is worse than guessed at and more is no worse; a cap keeps their spread
            from hiding the differences between good masks.

    Raises:
        UnknownNameError: There is no such timing.
        InvalidRequestError: The cap is not above 0.
    """

    name: ClassVar[str] = "perplexity"
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # a rare mask beats the dense one

    timing: str = "terminal"
    loss_cap: float | None = None

    def __post_init__(self) -> None:
        if self.timing not in TIMINGS:
            raise UnknownNameError("timing of the reward", self.timing, TIMINGS)
        if self.loss_cap is not None and not self.loss_cap > 0:
            raise InvalidRequestError(
                f"loss_cap must be above 0 nats per token, or None, not {self.loss_cap!r}."
            )

    @property
    def pays_every_step(self) -> bool:
        """Whether the timing is dense."""
        return self.timing == "dense"

    def step(self, outcome: Outcome) -> float:
        """Minus the loss added by this step (dense) or by the whole episode (terminal)."""
        if not self.pays_every_step:
            return -self._capped(outcome.loss) if outcome.ends else 0.0
        if outcome.loss_before is None:
            raise ValueError("A dense reward needs the loss of the mask before each step.")
        return self._capped(outcome.loss_before) - self._capped(outcome.loss)

    def _capped(self, loss: float) -> float:
        return loss if self.loss_cap is None else min(loss, self.loss_cap)


@dataclass(frozen=True)
class AccuracyReward(RewardTerm):
    """The final mask's mean task accuracy less the dense model's; paid by the last step.

    This is what users feel, but coarse: on n questions it moves in steps of 1 / n, so it suits
    fine-tuning an agent better than teaching it, or the ``combined`` reward.

    Attributes:
        tasks: Measures the accuracies; they are deterministic (log-likelihoods, no sampling).
    """

    name: ClassVar[str] = "accuracy"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    tasks: MeasuresAccuracy = field(repr=False)

    def step(self, outcome: Outcome) -> float:
        """The drop in accuracy, as a number of at most 0 unless pruning helped."""
        if not outcome.ends or not outcome.mask:
            return 0.0
        return self.tasks.mean_accuracy(outcome.mask) - self.tasks.mean_accuracy(BlockMask())


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

    def step(self, outcome: Outcome) -> dict[str, float]:
        """Each term's share of the reward by name; the reward is their sum.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        return {term.name: weight * term.step(outcome) for weight, term in self.weighted}

    def nothing(self) -> dict[str, float]:
        """The shares of a step that pays nothing."""
        return {term.name: 0.0 for _, term in self.weighted}


REWARDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("timing", "loss_cap"),
    "accuracy": (),
    "combined": ("weights", "timing", "loss_cap"),
}
"""Every reward with the settings it has."""

_COMBINED_WEIGHTS = {"perplexity": 1.0, "accuracy": 1.0}


def make_reward(spec: str | Mapping[str, Any], tasks: Callable[[], MeasuresAccuracy]) -> Reward:
    """The reward that a spec names.

    Args:
        spec: ``"perplexity"``, ``"accuracy"`` or ``"combined"``, or a dict with that ``name``
            and settings: ``timing`` and ``loss_cap`` as in `PerplexityReward`, and for
            ``combined`` the ``weights`` by term (1 each by default; 0 leaves a term out).
        tasks: Gives what measures accuracies; called only where it is needed.

    Raises:
        UnknownNameError: There is no such reward, setting, timing or term.
        InvalidRequestError: A weight or the cap is out of its range.
    """
    name, settings = split_spec(spec, "reward", REWARDS)
    check_settings(settings, f"the reward {name!r}", REWARDS[name])
    weights = settings.pop("weights", _COMBINED_WEIGHTS) if name == "combined" else {name: 1.0}
    for term, weight in weights.items():
        if term not in _COMBINED_WEIGHTS:
            raise UnknownNameError("reward term", term, _COMBINED_WEIGHTS)
        if not 0 <= weight < math.inf:
            raise InvalidRequestError(
                f"The weight of the reward term {term!r} must be at least 0, not {weight!r}."
            )
    if not any(weights.values()):
        raise InvalidRequestError("The reward 'combined' needs a weight above 0 for some term.")
    if name != "accuracy":
        perplexity = PerplexityReward(**settings)  # checks settings, used or not
    weighted: list[tuple[float, RewardTerm]] = []
    for term, weight in weights.items():
        if weight:
            kind = perplexity if term == "perplexity" else AccuracyReward(tasks())
            weighted.append((float(weight), kind))
    return Reward(tuple(weighted))

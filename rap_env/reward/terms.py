"""Reward terms: each turns measurements of masks into one number to be maximised.

Each class states its range, its baseline (the mask whose reward is 0), whether it is
deterministic, and what it gives when an episode fails (is truncated before the request fits).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError, UnknownNameError

TIMINGS = ("terminal", "dense")

SCALES = ("nats", "log")
"""A loss as it is, or its logarithm."""

COMPARED_TO = ("gsi", "one_shot", "frontier")
"""Baselines that a reward can be relative to."""


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
        baseline_loss: Loss of the mask that the baseline named by `RewardTerm.relative_to` has
            for the same request; None if no term names one, or if the episode goes on.
    """

    mask: BlockMask
    loss: float
    loss_before: float | None
    ends: bool
    baseline_loss: float | None = None


class RewardTerm(ABC):
    """One reason to prefer a mask. A term of the whole reward, in its own unit."""

    name: ClassVar[str]
    range: ClassVar[tuple[float, float]]
    """Least and greatest return of an episode."""
    baseline: ClassVar[str] = "the dense model: no block removed gives 0"
    deterministic: ClassVar[bool] = True
    """The same masks always give the same rewards."""
    on_failure: ClassVar[str] = "what the mask reached is worth, as for an episode that fits"
    relative_to: str | None = None
    """Baseline whose loss at the same request is needed where an episode ends, or None."""

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
    """Minus the cost of the final mask: its loss, or the logarithm of it.

    The log of perplexity rather than perplexity: it adds up over steps, and a ruined model
    does not drown all other episodes. With ``timing="dense"`` each step pays the cost that its
    removal adds; with ``"terminal"`` the last step pays the whole. Undiscounted, both give the
    same return, since the differences telescope; the dense one tells the agent sooner which
    removal hurt, the terminal one costs one model evaluation an episode and not one a step.

    Losses of requests differ by orders of magnitude, so that a learner mostly learns which
    requests are hard. Two settings take that out, one at a time or together:
    ``relative_to`` adds a baseline's cost at the same request, so that the return is the
    advantage over it, and 0 where the policy chooses the baseline's mask; ``scale="log"`` makes
    the same ratio of losses worth the same at every request. Together the return is
    ``log((baseline_loss + log_offset) / (loss + log_offset))``.

    Attributes:
        timing: ``"terminal"`` (default: an episode removes 10 to 30 blocks, so it is that much
            cheaper) or ``"dense"``. The baseline is paid by the last step in both.
        loss_cap: Losses above it count as this many nats per token; None for no cap (default:
            the return is then exactly minus the loss). Random masks reach 10 and more, where
            the text is worse than guessed at and more is no worse; a cap keeps their spread
            from hiding the differences between good masks. A baseline's loss is capped too.
        scale: ``"nats"`` (default): the cost is the loss; ``"log"``: it is
            ``log((loss + log_offset) / log_offset)``, and ``loss / log_offset`` where the loss is
            negative. That is its tangent at 0: defined for every loss, and a mask a little
            better than the dense model is worth a little and not infinitely much.
        relative_to: ``"gsi"`` or ``"one_shot"``: the mask of that order, followed until the
            request fits; ``"frontier"``: the best one known; None (default): the dense model.
            Needs one more evaluation for each request that is new.
        log_offset: Nats per token: losses well below it count as equally good.

    Raises:
        UnknownNameError: There is no such timing, scale or baseline.
        InvalidRequestError: The cap or the offset is not above 0.
    """

    name: ClassVar[str] = "perplexity"
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # a rare mask beats the dense one
    baseline: ClassVar[str] = (
        "the dense model: no block removed gives 0; with relative_to it is that baseline's mask"
    )

    timing: str = "terminal"
    loss_cap: float | None = None
    scale: str = "nats"
    relative_to: str | None = None
    log_offset: float = 0.05

    def __post_init__(self) -> None:
        if self.timing not in TIMINGS:
            raise UnknownNameError("timing of the reward", self.timing, TIMINGS)
        if self.scale not in SCALES:
            raise UnknownNameError("scale of the reward", self.scale, SCALES)
        if self.relative_to not in (None, *COMPARED_TO):
            raise UnknownNameError("baseline of the reward", self.relative_to, COMPARED_TO)
        if self.loss_cap is not None and not self.loss_cap > 0:
            raise InvalidRequestError(
                f"loss_cap must be above 0 nats per token, or None, not {self.loss_cap!r}."
            )
        if not 0 < self.log_offset < math.inf:
            raise InvalidRequestError(
                f"log_offset must be above 0 nats per token, not {self.log_offset!r}."
            )

    @property
    def pays_every_step(self) -> bool:
        """Whether the timing is dense."""
        return self.timing == "dense"

    def step(self, outcome: Outcome) -> float:
        """Minus the cost added by this step (dense) or by the whole episode (terminal)."""
        owed = self._baseline_cost(outcome) if outcome.ends else 0.0
        if not self.pays_every_step:
            return owed - self._cost(outcome.loss) if outcome.ends else 0.0
        if outcome.loss_before is None:
            raise ValueError("A dense reward needs the loss of the mask before each step.")
        return owed + self._cost(outcome.loss_before) - self._cost(outcome.loss)

    def _baseline_cost(self, outcome: Outcome) -> float:
        if self.relative_to is None:
            return 0.0
        if outcome.baseline_loss is None:
            raise ValueError("A relative reward needs the loss of the baseline's mask.")
        return self._cost(outcome.baseline_loss)

    def _cost(self, loss: float) -> float:
        """What a loss counts as; 0 for the dense model."""
        if self.loss_cap is not None:
            loss = min(loss, self.loss_cap)
        if self.scale == "nats":
            return loss
        share = loss / self.log_offset
        return math.log1p(share) if share > 0 else share


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

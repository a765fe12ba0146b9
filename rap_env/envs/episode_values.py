"""Values of episodes: the start, a step that is rewarded, and what the model measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan
from rap_env.request import Request


class Measurement(NamedTuple):
    """Measurements of a plan by the model.

    Attributes:
        nll: NLL in nats per token.
        delta_nll: NLL minus that of the model at the start of an episode.
        predicted: Whether the score is the prediction of a score table, not a measurement.
        baseline_delta_nll: The ΔNLL of the plan that the reward's baseline has for the same
            request, or None where the reward did not ask for it.
    """

    nll: float
    delta_nll: float
    predicted: bool
    baseline_delta_nll: float | None = None


@dataclass(frozen=True)
class EpisodeStart:
    """The initial state of an episode: the unchanged model under a request.

    Attributes:
        costs: What the levels of all items need for it.
        asked_budget_bytes: The budget before it was raised to the least possible one, or None.
    """

    request: Request
    costs: LadderCosts
    asked_budget_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the unchanged model fits the request, so that there is nothing to do."""
        return self.costs.dense_peak_bytes <= self.request.budget_bytes

    @property
    def feasible(self) -> bool:
        """Whether an episode can meet the budget."""
        return self.costs.least_peak_bytes <= self.request.budget_bytes


class RewardedStep(NamedTuple):
    """A step that is rewarded, before anything is measured.

    Attributes:
        start: The request of its episode.
        plan: The plan after the step, or `PruningTask.lowest` if `max_steps` ends the episode.
        delta_nll_before: ΔNLL of the plan before the step, or None if it was not measured.
        ends: Whether the episode ends with this step.
        fails: Whether it is truncated, over its budget.
    """

    start: EpisodeStart
    plan: Plan
    delta_nll_before: float | None
    ends: bool
    fails: bool

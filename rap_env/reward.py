"""Rewards: weighted sums of terms, each of which turns measurements of masks into a number.

The environment measures a mask only where a step is rewarded: at the end of an episode, or at
each step if the reward says so. This lets many environments have their masks scored together.

Each term states its range, its baseline (the mask whose reward is 0), whether it is
deterministic, and its value when an episode fails (is truncated before the request fits).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rap_env.errors import InvalidRequestError, check_name
from rap_env.plan import Plan
from rap_env.specs import check, check_settings, setting, split_spec

TIMINGS = ("terminal", "dense")

SCALES = ("nats", "log")
"""Whether a cost is the ΔNLL itself or its logarithm."""

COMPARED_TO = ("gsi", "one_shot", "frontier")
"""Baselines that a reward can be relative to."""


class MeasuresAccuracy(Protocol):
    """Gives results of tasks under plans, such as `rap_env.scoring.tasks.TaskScorer`."""

    def mean_accuracy(self, plan: Plan, /) -> float:
        """Mean accuracy over the tasks, in [0, 1]."""

    def mean_choice_nll(self, plan: Plan, /) -> float:
        """Mean NLL of the right choice among the choices, over the tasks, in nats."""


class StepOutcome(NamedTuple):
    """Measurements of a step that is rewarded; for m steps at once a list and arrays (m,).

    Attributes:
        mask: The plan after the step.
        delta_nll: Its NLL minus the native model's, nats per token; 0 for the native model.
        delta_nll_before: The same of the mask before the step (the same mask for an invalid
            action), or None if it was not measured.
        ends: Whether the episode ends with this step, terminated or truncated.
        baseline_delta_nll: The same of the mask that the baseline named by
            `RewardTerm.relative_to` has for this request; None if no term names one. It
            counts where the episode ends.
        fails: Whether the episode ends over its budget and has to rank below every plan that
            fits.
    """

    mask: Any
    delta_nll: Any
    delta_nll_before: Any
    ends: Any
    baseline_delta_nll: Any = None
    fails: Any = False


class RewardTerm(ABC):
    """One term of a reward, in its own unit."""

    relative_to: str | None = None
    """Baseline whose ΔNLL at the same request is needed where an episode ends, or None."""

    @property
    def pays_every_step(self) -> bool:
        """Whether each step is rewarded, not only the one that ends an episode."""
        return False

    @abstractmethod
    def step(self, outcome: StepOutcome) -> Any:
        """Return the reward of a step, or of each of m steps, (m,).

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """


@dataclass(frozen=True)
class PerplexityReward(RewardTerm):
    """Minus the cost of the final mask: its ΔNLL, or the logarithm of it.

    It uses the log of perplexity rather than perplexity: the log adds up over steps, and one
    ruined model does not dominate all other episodes. With ``timing="dense"`` each step is
    charged the cost that its removal adds; with ``"terminal"`` the last step is charged all
    of it. Undiscounted, both give the same return, since the differences telescope; the dense
    one tells the agent sooner which removal hurt, the terminal one takes one model evaluation
    per episode instead of one per step.

    The ΔNLL differs between requests by orders of magnitude, so a learner mostly learns which
    requests are hard. Two settings remove that effect, separately or together:
    ``relative_to`` adds a baseline's cost at the same request, so that the return is the
    advantage over the baseline, and 0 where the policy chooses the baseline's mask;
    ``scale="log"`` makes equal ratios of ΔNLL worth the same at every request. Together the
    return is ``log((baseline + log_offset) / (delta_nll + log_offset))``.

    Attributes:
        timing: ``"terminal"`` (default: an episode removes 10 to 30 blocks, so it needs that
            many times fewer evaluations) or ``"dense"``. The baseline is paid at the last
            step in both.
        loss_cap: A larger ΔNLL counts as this many nats per token; None for no cap (default:
            the return is then exactly minus the ΔNLL). Random masks reach 10 and more, where
            the model is worse than guessing and larger values carry no information; a cap
            keeps their spread from hiding differences between good masks. A baseline's ΔNLL
            is capped too.
        scale: ``"nats"`` (default): the cost is the ΔNLL; ``"log"``: it is
            ``log((delta_nll + log_offset) / log_offset)``, and ``delta_nll / log_offset``
            where the ΔNLL is negative. That is its tangent at 0: defined for every ΔNLL, and
            a mask slightly better than the native model is worth slightly more, not infinitely
            more.
        relative_to: ``"gsi"`` or ``"one_shot"``: the mask of that order, followed until the
            request fits; ``"frontier"``: the best known one; None (default): the native model.
            It needs one more evaluation for each new request.
        log_offset: Nats per token; ΔNLL values well below it count as equally good.

    Raises:
        UnknownNameError: There is no such timing, scale or baseline.
        InvalidRequestError: A value has the wrong type, or the cap or the offset is not above
            0.
    """

    timing: str = setting("terminal", choices=TIMINGS, kind="timing of the reward")
    loss_cap: float | None = setting(None, above=0)
    scale: str = setting("nats", choices=SCALES, kind="scale of the reward")
    relative_to: str | None = setting(None, choices=COMPARED_TO, kind="baseline of the reward")
    log_offset: float = setting(0.05, above=0)

    def __post_init__(self) -> None:
        check(self)

    @property
    def pays_every_step(self) -> bool:
        """Whether the timing is dense."""
        return self.timing == "dense"

    def step(self, outcome: StepOutcome) -> Any:
        """Minus the cost added by this step (dense) or by the whole episode (terminal)."""
        cost = self._cost(outcome.delta_nll)
        if self.loss_cap is not None:
            over_budget = self._scaled(over_budget_nll(self.loss_cap))
            cost = np.where(outcome.fails, over_budget, cost)
        baseline: Any = 0.0
        if self.relative_to is not None and np.any(outcome.ends):
            assert outcome.baseline_delta_nll is not None  # measured at the end
            baseline = np.where(outcome.ends, self._cost(outcome.baseline_delta_nll), 0.0)
        if not self.pays_every_step:
            return np.where(outcome.ends, baseline - cost, 0.0)
        assert outcome.delta_nll_before is not None  # measured at each step
        return baseline + self._cost(outcome.delta_nll_before) - cost

    def _cost(self, delta_nll: Any) -> Any:
        """Cost of a ΔNLL on the reward's scale; 0 for the native model."""
        if self.loss_cap is not None:
            delta_nll = np.minimum(delta_nll, self.loss_cap)
        return self._scaled(delta_nll)

    def _scaled(self, delta_nll: Any) -> Any:
        if self.scale == "nats":
            return delta_nll
        ratio = delta_nll / self.log_offset
        return np.where(ratio > 0, np.log1p(np.maximum(ratio, 0.0)), ratio)


@dataclass(frozen=True)
class TaskReward(RewardTerm):
    """What the final mask changes of a score on tasks, paid at the last step.

    - ``accuracy``: the mean accuracy, from -1 to 1. It is what users notice, but it is
      coarse: on n questions it moves in steps of 1 / n. It suits fine-tuning an agent, or the
      ``combined`` reward, better than training from scratch.
    - ``recall``: minus the NLL of right choices, its smooth form: each question counts by the
      probability that the right choice has among the choices; a guess among four choices has
      1.39 nats. On tasks of long contexts, such as ``rap_recall_1024``, it shows what windows
      and caches of few bits do to recall, which the perplexity hides.

    Attributes:
        score: The score of a mask; it is deterministic (log-likelihoods, no sampling).
        failed: What an episode that fails is paid; None pays for the mask that it reached.
        most_lost: A larger loss counts as this much; None for no cap.
    """

    score: Callable[[Plan], float] = field(repr=False)
    failed: float | None = None
    most_lost: float | None = None

    def step(self, outcome: StepOutcome) -> Any:
        """The change in the score, at most 0 unless pruning helped."""
        if isinstance(outcome.mask, Plan):
            return self._of(outcome.mask, outcome.ends, outcome.fails)
        return np.array([*map(self._of, outcome.mask, outcome.ends, outcome.fails)])

    def _of(self, plan: Plan, ends: bool, fails: bool) -> float:
        if fails and self.failed is not None:
            return self.failed
        if not ends or not plan:
            return 0.0
        gain = self.score(plan) - self.score(Plan())
        return gain if self.most_lost is None else max(gain, -self.most_lost)


@dataclass(frozen=True)
class Reward:
    """A weighted sum of terms.

    Attributes:
        weighted: The weight of each term, and the term, by its name.
    """

    weighted: Mapping[str, tuple[float, RewardTerm]]

    @cached_property
    def pays_every_step(self) -> bool:
        """Whether each step is rewarded, so that every intermediate mask has to be measured."""
        return any(term.pays_every_step for _, term in self.weighted.values())

    @cached_property
    def relative_to(self) -> str | None:
        """The baseline whose ΔNLL has to be measured where an episode ends, or None."""
        named = (term.relative_to for _, term in self.weighted.values())
        return next((name for name in named if name is not None), None)

    def step(self, outcome: StepOutcome) -> dict[str, Any]:
        """Each term's share of the reward by name; the reward is their sum.

        For m steps at once they are arrays (m,).
        """
        weighted = self.weighted.items()
        return {name: weight * term.step(outcome) for name, (weight, term) in weighted}

    def zeros(self) -> dict[str, float]:
        """The terms of a step that is not rewarded."""
        return dict.fromkeys(self.weighted, 0.0)


_PERPLEXITY_SETTINGS = tuple(entry.name for entry in fields(PerplexityReward))

REWARDS: dict[str, tuple[str, ...]] = {
    "perplexity": _PERPLEXITY_SETTINGS,
    "accuracy": (),
    "recall": (),
    "combined": ("weights", *_PERPLEXITY_SETTINGS),
}
"""Every reward with the names of its settings."""

_COMBINED_WEIGHTS = {"perplexity": 1.0, "accuracy": 1.0}
_TERMS_OF_TASKS = ("accuracy", "recall")
_TERMS = ("perplexity", *_TERMS_OF_TASKS)


def ceiling_nll(vocab_size: int) -> float:
    """The most nats per token that a plan within its budget can cost: those of a uniform guess."""
    return math.log(vocab_size)


def over_budget_nll(ceiling: float) -> float:
    """Nats per token that a plan over its budget counts as: more than a plan that fits can cost."""
    return 2 * ceiling


def plan_scores(
    delta_nll: Sequence[float], fits: Sequence[bool], vocab_size: int
) -> npt.NDArray[np.float64]:
    """What plans count as, nats per token, so that each that fits ranks above all that do not.

    A plan that fits counts as its ΔNLL, at most `ceiling_nll`. One over its budget counts as
    twice the ceiling, whatever its ΔNLL.

    Args:
        delta_nll: The ΔNLL of each plan, nats per token.
        fits: Whether each plan is within its budget.
        vocab_size: Entries of the model's vocabulary.
    """
    ceiling = ceiling_nll(vocab_size)
    counted = np.minimum(np.asarray(delta_nll, dtype=np.float64), ceiling)
    return np.where(fits, counted, over_budget_nll(ceiling))


def make_reward(
    spec: str | Mapping[str, Any],
    tasks: Callable[[], MeasuresAccuracy],
    ceiling: float | None = None,
) -> Reward:
    """Make the reward that a spec names.

    Args:
        spec: ``"perplexity"``, ``"accuracy"``, ``"recall"`` or ``"combined"``, or a dict with
            that ``name`` and settings: those of `PerplexityReward`, and for ``combined`` also
            the ``weights`` by term (1 each for perplexity and accuracy by default; 0 leaves a
            term out).
        tasks: Returns what measures tasks; called only if a term needs it.
        ceiling: Cap of the cost of a plan in nats, so that an episode that fails can rank
            below every plan that fits; None for no cap but that of the spec.

    Raises:
        UnknownNameError: There is no such reward, setting, timing, scale, baseline or term.
        InvalidRequestError: A weight, the cap or the offset is out of its range.
    """
    weights, perplexity = parse_reward(spec)
    if ceiling is not None:
        cap = perplexity.loss_cap
        perplexity = replace(perplexity, loss_cap=ceiling if cap is None else min(cap, ceiling))

    def make(term: str) -> RewardTerm:
        if term == "perplexity":
            return perplexity
        measures = tasks()
        if term == "accuracy":
            return TaskReward(measures.mean_accuracy, failed=-2.0)  # twice the worst change
        failed = None if ceiling is None else -over_budget_nll(ceiling)
        return TaskReward(lambda plan: -measures.mean_choice_nll(plan), failed, ceiling)

    return Reward({term: (float(w), make(term)) for term, w in weights.items() if w})


def parse_reward(spec: str | Mapping[str, Any]) -> tuple[Mapping[str, float], PerplexityReward]:
    """Weights by term of the reward that a spec names, and its term `perplexity`, used or not.

    Raises:
        RapError: As for `make_reward`.
    """
    name, settings = split_spec(spec, "reward", REWARDS)
    check_settings(settings, f"the reward {name!r}", REWARDS[name])
    weights: Mapping[str, float] = {name: 1.0}
    if name == "combined":
        weights = settings.get("weights", _COMBINED_WEIGHTS)
    _check_weights(weights)
    perplexity = {key: value for key, value in settings.items() if key != "weights"}
    return weights, PerplexityReward(**perplexity)


def uses_tasks(spec: str | Mapping[str, Any]) -> bool:
    """Whether the reward that a spec names has a term that is measured on tasks."""
    weights, _ = parse_reward(spec)
    return any(weight and term in _TERMS_OF_TASKS for term, weight in weights.items())


def _check_weights(weights: Mapping[str, float]) -> None:
    """Reject weights of unknown terms, negative weights, and weights that are all 0."""
    if not isinstance(weights, Mapping):
        raise InvalidRequestError(f"weights must be a dict of terms and numbers, not {weights!r}.")
    for term, weight in weights.items():
        check_name("reward term", term, _TERMS)
        if not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise InvalidRequestError(
                f"The weight of the reward term {term!r} must be at least 0, not {weight!r}."
            )
    if not any(weights.values()):
        raise InvalidRequestError("The reward 'combined' needs a weight above 0 for some term.")

"""The parts that environments of one model share: workload, measurements, rewards, observations.

Both environments lower the items of a ladder; their configurations say which items and levels
there are, what is observed of them, and how infos and messages call them.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from rap_env.context.base import PruningContext, make_encoder, method_order
from rap_env.context.opening import open_context
from rap_env.envs.config import EnvConfig, parse_tasks
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.ladder.state import LadderCosts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.reward import MeasuresAccuracy, StepOutcome, ceiling_nll, make_reward, uses_tasks
from rap_env.specs import check_settings
from rap_env.workload import make_sampler

_MAX_DRAWS = 100

_task_scorers: WeakKeyDictionary[PruningContext, dict[Any, MeasuresAccuracy]] = WeakKeyDictionary()


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
        asked_budget_bytes: The budget before it was raised to the least possible one, or
            None.
    """

    request: Request
    costs: LadderCosts
    asked_budget_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the unchanged model fits the request, so that there is nothing to do."""
        return self.costs.dense_peak_bytes <= self.request.budget_bytes

    @property
    def is_pointless(self) -> bool:
        """Whether the unchanged model fits, or the lowest levels need no fewer bytes than it."""
        return self.fits or self.costs.least_peak_bytes >= self.costs.dense_peak_bytes

    @property
    def feasible(self) -> bool:
        """Whether an episode can meet the budget."""
        return self.costs.least_peak_bytes <= self.request.budget_bytes


class RewardedStep(NamedTuple):
    """A step that is rewarded, before anything is measured.

    Attributes:
        start: The request of its episode.
        plan: The plan after the step, or the lowest levels if `max_steps` ends the episode.
        delta_nll_before: ΔNLL of the plan before the step, or None if it was not measured.
        ends: Whether the episode ends with this step.
        fails: Whether it is truncated, over its budget.
    """

    start: EpisodeStart
    plan: Plan
    delta_nll_before: float | None
    ends: bool
    fails: bool


ShownLevels = list[str] | npt.NDArray[np.int8]
"""What `info` says of a plan: names, or the positions of levels."""

Baseline = Callable[[EpisodeStart], Plan]
"""Gives the plan of a baseline for the request of an episode."""


class PruningTask:
    """The parts of an environment that do not depend on an episode; many environments share one.

    Attributes:
        encoder: Encodes observations; its ladder has the items that actions lower.
        sampler: Draws requests.
        reward: The reward; see `compute_rewards`.
        invalid_action_penalty: What an invalid action costs.
        max_invalid_actions: Number of invalid actions that ends an episode.
        max_steps: Number of steps that ends an episode, or None.
        info_arrays: Whether `info` has arrays of fixed shape in the place of names.
        info_key: The entry of infos with the plan.
        delta_key: The entry of infos with the ΔNLL.
    """

    def __init__(self, config: EnvConfig, context: PruningContext | None = None) -> None:
        if config.tasks is not None and uses_tasks(config.reward):
            from rap_env.scoring.lm_eval_tasks import check_scorable

            check_scorable(parse_tasks(config.tasks).names)
        self.context = open_context(config.context_config()) if context is None else context
        try:
            self.memory: MemoryModel = self.context.memory
        except AttributeError:
            raise InvalidRequestError(
                f"context must be a pruning context, not {context!r}; make one with "
                "rap_env.context.open_context(ContextConfig(...)), or pass None."
            ) from None
        self.sampler = make_sampler(config.workload, self.memory)
        self._worst = config.over_budget == "worst"
        ceiling = ceiling_nll(self.memory.facts.vocab_size) if self._worst else None
        tasks = config.tasks
        self.reward = make_reward(config.reward, lambda: task_scorer(self.context, tasks), ceiling)
        self.invalid_action_penalty = float(config.invalid_action_penalty)
        self.max_invalid_actions = int(config.max_invalid_actions)
        self.max_steps = config.max_steps
        self._step_limit = math.inf if config.max_steps is None else config.max_steps
        self.info_arrays = config.info == "arrays"
        self._infeasible = config.infeasible
        self.info_key, self.delta_key = config.info_key, config.delta_key
        self._unchanged, self._verb = config.unchanged, config.verb
        self._names_removed = config.info_key == "removed"
        self.encoder = make_encoder(self.context, config.layout, config.levels, config.together)
        self.ladder = self.encoder.ladder
        name = self.reward.relative_to
        self._baseline: Baseline | None = None if name is None else self.baseline(name)

    def baseline(self, name: str) -> Baseline:
        """A baseline of the reward: an order followed until the request fits, or the best plans.

        Raises:
            InvalidRequestError: The order was not measured.
            ArtifactError: There is no table of the best plans.
        """
        if name == "frontier":
            known = self.context.frontier.on(self.ladder)

            def best(start: EpisodeStart) -> Plan:
                plan = known.best(start.costs, start.request.budget_bytes)
                if plan is None:
                    raise InvalidRequestError(
                        f"No plan of the frontier fits {start.request}, so a reward cannot be "
                        "relative to it; build the frontier for smaller budgets too, or give the "
                        "workload larger ones."
                    )
                return plan

            return best
        if name == "gsi" and self.context.importance == "none":
            raise InvalidRequestError(
                "A reward relative to 'gsi' needs the GSI order, but importance='none' leaves it "
                "out; use importance='gsi', or relative_to='one_shot'."
            )
        steps, _ = method_order(self.context, self.encoder.ladder_bytes, name)
        return lambda start: start.costs.lower_until_fits(steps, start.request.budget_bytes)

    def shown_levels(self, positions: Sequence[int]) -> ShownLevels:
        """What `info` says of a plan."""
        if self.info_arrays:
            return np.array(positions, np.int8)
        if self._names_removed:
            return [self.ladder.items[i].name for i, position in enumerate(positions) if position]
        levels = zip(self.ladder.level_names, positions, strict=True)
        return [names[position] for names, position in levels]

    def show_level(self, levels: ShownLevels, item: int, position: int) -> None:
        """Update what `shown_levels` returned after an item moved to a level."""
        if isinstance(levels, np.ndarray):
            levels[item] = position
        elif self._names_removed:
            insort(levels, self.ladder.items[item].name, key=self.ladder.numbers.__getitem__)
        else:
            levels[item] = self.ladder.level_names[item][position]

    def truncates(self, over_budget: Any, invalid_actions: Any, steps: Any) -> tuple[Any, Any]:
        """Whether a step truncates its episode, and whether because there were too many steps.

        Args:
            over_budget: Whether the request does not fit yet; like the others, a value or an
                array.
            invalid_actions: Number of invalid actions, that of the step included.
            steps: Number of steps, the step included.
        """
        out_of_steps = over_budget & (steps >= self._step_limit)
        return out_of_steps | (
            over_budget & (invalid_actions >= self.max_invalid_actions)
        ), out_of_steps

    @cached_property
    def measured_start(self) -> Measurement:
        """The measurement of the unchanged model."""
        nll = self.context.scorer.dense_nll
        return Measurement(nll, 0.0, self.context.scorer.is_predicted(Plan()))

    def measure(self, plans: Sequence[Plan]) -> list[Measurement]:
        """Measure plans; missing scores are measured together."""
        scorer, start_nll = self.context.scorer, self.measured_start.nll
        scores = zip(plans, scorer.nll_many(plans), strict=True)
        return [
            Measurement(nll, nll - start_nll, scorer.is_predicted(plan)) for plan, nll in scores
        ]

    def compute_rewards(
        self, steps: Sequence[RewardedStep]
    ) -> list[tuple[Measurement, dict[str, float]]]:
        """The measurement of each step's plan, and the reward's terms by name.

        All missing scores are measured together, those of the baseline's plans included.
        """
        ends = [number for number, step in enumerate(steps) if step.ends]
        baseline = self._baseline
        baselines = [] if baseline is None else [baseline(steps[number].start) for number in ends]
        measured = self.measure([*(step.plan for step in steps), *baselines])
        if baselines:
            for number, compared in zip(ends, measured[len(steps) :], strict=True):
                compared_to = compared.delta_nll
                measured[number] = measured[number]._replace(baseline_delta_nll=compared_to)
        scored = zip(steps, measured, strict=False)
        return [(measurement, self._terms(step, measurement)) for step, measurement in scored]

    def _terms(self, step: RewardedStep, measured: Measurement) -> dict[str, float]:
        outcome = StepOutcome(
            step.plan,
            measured.delta_nll,
            step.delta_nll_before,
            step.ends,
            measured.baseline_delta_nll,
            step.fails and self._worst,
        )
        return self.reward.step(outcome)

    def costs(self, request: Request) -> LadderCosts:
        """The bytes of a request's batch size and length.

        Raises:
            InvalidRequestError: The model cannot serve them.
        """
        return self.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)

    def start_episode(
        self, rng: np.random.Generator, options: Mapping[str, Any] | None
    ) -> EpisodeStart:
        """The start of an episode with a request of the workload, or the one in `options`."""
        options = reset_options(options)
        check_settings(options, "reset", ["request"])
        if options.get("request") is None:
            return self._feasible(self._draw(rng))
        start = self._start_of(_request_of(options["request"], self.memory))
        if start.is_pointless:
            raise InvalidRequestError(self._pointless(start))
        return self._feasible(start)

    def _start_of(self, request: Request) -> EpisodeStart:
        return EpisodeStart(request, self.costs(request))

    def unknown_action(self, action: object) -> UnknownNameError:
        """The error for an action that does not exist."""
        items, last = self.ladder.items, len(self.ladder) - 1
        known = [f"0 ({items[0].name}) ... {last} ({items[last].name})"]
        return UnknownNameError("action", action, known)

    def _pointless(self, start: EpisodeStart) -> str:
        if start.fits:
            return (
                f"The {self._unchanged} model already fits {start.request} (it needs "
                f"{start.costs.dense_peak_bytes:,} bytes), so there is nothing to {self._verb}; "
                "give a smaller budget."
            )
        return (
            f"The lowest levels need no fewer bytes than the native model for {start.request}, so "
            "there is nothing to lower; give a longer sequence, or name other levels."
        )

    def _nothing_drawn(self, start: EpisodeStart) -> str:
        if start.fits:
            return (
                f"The {self._unchanged} model fits each of {_MAX_DRAWS} requests drawn from the "
                f"workload, the last one {start.request}; give the workload smaller budgets."
            )
        return (
            f"None of the requests drawn from the workload can be helped. {self._pointless(start)}"
        )

    def _draw(self, rng: np.random.Generator) -> EpisodeStart:
        """A request of the workload for which there is something to do, and that can be met.

        Others are drawn again, so that one unlucky draw does not end a training.
        """
        for _ in range(_MAX_DRAWS):
            start = self._start_of(self.sampler.sample(rng))
            meets = self._infeasible == "clip" or start.feasible
            if meets and not start.is_pointless:
                return start
        if not start.is_pointless:
            self.encoder.ladder_bytes.check_feasible(start.request)
        raise InvalidRequestError(self._nothing_drawn(start))

    def _feasible(self, start: EpisodeStart) -> EpisodeStart:
        """The start with its budget raised, if necessary, to one that can be met."""
        if start.feasible:
            return start
        asked, costs = start.request.budget_bytes, start.costs
        if self._infeasible == "error":
            self.encoder.ladder_bytes.check_feasible(start.request)
        raised = replace(start.request, budget_bytes=costs.least_peak_bytes)
        return EpisodeStart(raised, costs, asked)


def task_scorer(
    context: PruningContext, tasks: Sequence[str] | Mapping[str, Any] | None
) -> MeasuresAccuracy:
    """The scorer of task accuracies on a context; one for each set of tasks, see `parse_tasks`."""
    from rap_env.scoring.tasks import TaskScorer

    config = parse_tasks(tasks)
    scorers = _task_scorers.setdefault(context, {})
    if config not in scorers:  # building the requests of a task takes seconds
        scorers[config] = TaskScorer(context.llm, config, store=context.store)
    return scorers[config]


def _request_of(given: Request | Mapping[str, Any], memory: MemoryModel) -> Request:
    """The request that a user passed to ``reset``, in one of the forms that `RAPPruneEnv` names."""
    if isinstance(given, Request):
        memory.check(given.batch_size, given.seq_len_tokens)
        return given
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"A request must be a Request or a dict, not {given!r}.")
    shape, budgets = ("batch_size", "seq_len_tokens"), ("budget_bytes", "budget_fraction")
    check_settings(given, "a request", shape + budgets)
    if not all(key in given for key in shape) or sum(key in given for key in budgets) != 1:
        raise InvalidRequestError(
            "A request needs batch_size, seq_len_tokens and one of budget_bytes and "
            f"budget_fraction, not {sorted(given)}."
        )
    batch_size, seq_len_tokens = (given[key] for key in shape)
    # Checks that both are whole numbers, before any arithmetic is done with them.
    request = Request(batch_size, seq_len_tokens, given.get("budget_bytes", 1))
    memory.check(batch_size, seq_len_tokens)
    if "budget_fraction" in given:
        return Request.at_fraction(memory, batch_size, seq_len_tokens, given["budget_fraction"])
    return request


def reset_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of the options that a user passed to ``reset``.

    Raises:
        InvalidRequestError: They are neither a dict nor None.
    """
    if options is not None and not isinstance(options, Mapping):
        raise InvalidRequestError(
            "The options of reset must be a dict such as {'request': ...}, or None, not "
            f"{options!r}."
        )
    return dict(options or {})

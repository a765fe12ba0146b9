"""The parts that environments of one model share: workload, measurements, rewards, observations.

`PruningTask` is what both tasks have in common: an action lowers an item of a ladder.
`rap_env.envs.prune` and `rap_env.envs.ladder` say which items and levels there are, and what is
observed of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import create_empty_array

from rap_env.context.base import PruningContext
from rap_env.context.opening import open_context
from rap_env.envs.config import EnvConfig, parse_tasks
from rap_env.envs.episode_values import EpisodeStart, Measurement, RewardedStep
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.ladder.observation import ObservationEncoder
from rap_env.ladder.state import LadderCosts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.reward import MeasuresAccuracy, StepOutcome, ceiling_nll, make_reward, uses_tasks
from rap_env.scoring.lm_eval_tasks import check_scorable
from rap_env.specs import check_settings
from rap_env.workload import make_sampler

_MAX_DRAWS = 100

_task_scorers: WeakKeyDictionary[PruningContext, dict[Any, MeasuresAccuracy]] = WeakKeyDictionary()


ShownLevels = list[str] | npt.NDArray[np.int8]
"""What `info` says of a plan: names, or the positions of levels."""

Baseline = Callable[[EpisodeStart], Plan]
"""Gives the plan of a baseline for the request of an episode."""


class PruningTask(ABC):
    """The parts of an environment that do not depend on an episode; many environments share one.

    Attributes:
        encoder: Encodes observations; its ladder has the items that actions lower.
        sampler: Draws requests.
        reward: The reward; see `compute_rewards`.
        invalid_action_penalty: What an invalid action costs.
        max_invalid_actions: Number of invalid actions that ends an episode.
        max_steps: Number of steps that ends an episode, or None.
        info_arrays: Whether `info` has arrays of fixed shape in the place of names.
    """

    unchanged: ClassVar[str]
    """What messages call the model at the start of an episode."""
    verb: ClassVar[str]
    """What messages call an action."""
    info_key: ClassVar[str]
    """The entry of infos and saved states that says what was done to the model."""
    delta_key: ClassVar[str]
    """The entry of infos with the ΔNLL."""

    def __init__(self, config: EnvConfig, context: PruningContext | None = None) -> None:
        if config.tasks is not None and uses_tasks(config.reward):
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
        self.encoder = self.make_encoder(config)
        self.ladder = self.encoder.ladder
        name = self.reward.relative_to
        self._baseline: Baseline | None = None if name is None else self.baseline(name)

    @abstractmethod
    def make_encoder(self, config: Any) -> ObservationEncoder:
        """What encodes the observations of the context's model."""

    @abstractmethod
    def baseline(self, name: str) -> Baseline:
        """A baseline of the reward.

        Raises:
            InvalidRequestError: There is nothing that it could follow.
        """

    @abstractmethod
    def names_of(self, positions: Sequence[int]) -> list[str]:
        """What `info` says of a plan, as names."""

    @abstractmethod
    def update_names(self, names: list[str], item: int, position: int) -> None:
        """Update what `names_of` returned after an item moved to a level."""

    def shown_levels(self, positions: Sequence[int]) -> ShownLevels:
        """What `info` says of a plan."""
        return np.array(positions, np.int8) if self.info_arrays else self.names_of(positions)

    def show_level(self, levels: ShownLevels, item: int, position: int) -> None:
        """Update what `shown_levels` returned after an item moved to a level."""
        if isinstance(levels, list):
            self.update_names(levels, item, position)
        else:
            levels[item] = position

    def truncates(self, over_budget: Any, invalid_actions: Any, steps: Any) -> tuple[Any, Any]:
        """Whether a step truncates its episode, and whether because there were too many steps.

        Args:
            over_budget: Whether the request does not fit yet; like the others, a value or an array.
            invalid_actions: Number of invalid actions, that of the step included.
            steps: Number of steps, the step included.
        """
        out_of_steps = over_budget & (steps >= self._step_limit)
        return out_of_steps | (
            over_budget & (invalid_actions >= self.max_invalid_actions)
        ), out_of_steps

    def is_pointless(self, start: EpisodeStart) -> bool:
        """Whether an episode would end at its start, or could never come closer to its end."""
        return start.fits

    def new_arrays(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """Arrays for the observations of some episodes, (count, ...) each."""
        arrays: Any = create_empty_array(self.encoder.space, count)
        return dict(arrays)

    def start_of_saved(self, saved: Mapping[str, Any]) -> EpisodeStart:
        """The start of an episode that `Episode.saved` describes."""
        request = Request(**saved["request"])
        return EpisodeStart(request, self.costs(request), saved["asked_budget_bytes"])

    def measured_again(self, saved: Mapping[str, Any]) -> Measurement | None:
        """The measurement of the plan that `Episode.saved` describes, if it was measured."""
        return (
            self.measure([self.ladder.plan(saved["positions"])])[0] if saved["measured"] else None
        )

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
        if self.is_pointless(start):
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
        return (
            f"The {self.unchanged} model already fits {start.request} (it needs "
            f"{start.costs.dense_peak_bytes:,} bytes), so there is nothing to {self.verb}; "
            "give a smaller budget."
        )

    def _nothing_drawn(self, start: EpisodeStart) -> str:
        return (
            f"The {self.unchanged} model fits each of {_MAX_DRAWS} requests drawn from the "
            f"workload, the last one {start.request}; give the workload smaller budgets."
        )

    def _draw(self, rng: np.random.Generator) -> EpisodeStart:
        """A request of the workload for which there is something to do, and that can be met.

        Others are drawn again, so that one unlucky draw does not end a training.
        """
        for _ in range(_MAX_DRAWS):
            start = self._start_of(self.sampler.sample(rng))
            meets = self._infeasible == "clip" or start.feasible
            if meets and not self.is_pointless(start):
                return start
        if not self.is_pointless(start):
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

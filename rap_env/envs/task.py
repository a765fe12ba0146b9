"""The parts that environments of one model share: workload, measurements, rewards, observations.

Both environments lower the items of a ladder; their configurations say which items and levels
there are, what is observed of them, and how infos and messages call them.
"""

from __future__ import annotations

import itertools
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
from rap_env.errors import InvalidRequestError, RapError, UnknownNameError
from rap_env.ladder.items import Counts
from rap_env.ladder.state import LadderCosts, StackedCosts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.reward import MeasuresAccuracy, StepOutcome, ceiling_nll, make_reward, uses_tasks
from rap_env.scoring.score_table import TableScorer
from rap_env.specs import check_settings
from rap_env.workload import make_sampler

_MAX_DRAWS = 100
_AHEAD = 16  # requests that a single environment draws at most at once

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

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

    @classmethod
    def of(cls, values: Floats) -> Measurement | None:
        """From the fields as numbers, NaN where there is none, (4,); None if all are NaN."""
        nll, delta_nll, predicted, baseline = values.tolist()
        if math.isnan(nll):
            return None
        compared = None if math.isnan(baseline) else baseline
        return cls(nll, delta_nll, bool(predicted), compared)

    @property
    def values(self) -> Floats:
        """The fields as numbers, NaN where there is none, (4,)."""
        return np.array(self, dtype=np.float64)  # None becomes NaN


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
        return self.costs.native_peak_bytes <= self.request.budget_bytes

    @property
    def is_pointless(self) -> bool:
        """Whether the unchanged model fits, or the lowest levels need no fewer bytes than it."""
        return self.fits or self.costs.least_peak_bytes >= self.costs.native_peak_bytes

    @property
    def feasible(self) -> bool:
        """Whether an episode can meet the budget."""
        return self.costs.least_peak_bytes <= self.request.budget_bytes


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
        lowest_positions: The positions of the lowest levels, (items,).
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
        self._rewards_tasks = uses_tasks(config.reward)
        self.info_arrays = config.info == "arrays"
        self._infeasible = config.infeasible
        self.info_key, self.delta_key = config.info_key, config.delta_key
        self._unchanged, self._verb = config.unchanged, config.verb
        self._names_removed = config.info_key == "removed"
        self.encoder = make_encoder(self.context, **config.observed)
        self.ladder = self.encoder.ladder
        if isinstance(self.context.scorer, TableScorer):
            # Makes its tables, so that the first step is as fast as others.
            self.context.scorer.nll_at(self.ladder, np.zeros((0, len(self.ladder)), np.int64))
        self.lowest_positions = np.array(self.ladder.positions(self.ladder.lowest))
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
        given = np.array(positions, np.int8)
        return given if self.info_arrays else self.shown_names(given[None])[0]

    def shown_names(self, positions: npt.NDArray[np.int8]) -> list[list[str]]:
        """What `info` says of many plans, (n, items), by names."""
        if not self._names_removed:
            names: list[list[str]] = self._names[np.arange(len(self.ladder)), positions].tolist()
            return names
        plans, items = positions.nonzero()
        removed = self._names[items].tolist()
        ends = np.bincount(plans, minlength=len(positions)).cumsum().tolist()
        return [removed[start:end] for start, end in itertools.pairwise([0, *ends])]

    @cached_property
    def _names(self) -> npt.NDArray[np.object_]:
        """The names of the items, (items,), or of the levels of each, (items, W)."""
        if self._names_removed:
            return np.array([item.name for item in self.ladder.items], dtype=object)
        levels = itertools.zip_longest(*self.ladder.level_names)  # items differ in their number
        return np.array([*levels], dtype=object).T

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
        nll = self.context.scorer.native_nll
        return Measurement(nll, 0.0, self.context.scorer.is_predicted(Plan()))

    def measure(self, positions: Counts) -> Floats:
        """The fields of `Measurement` for plans (n, items), (4, n); missing scores together."""
        scorer, measured = self.context.scorer, np.full((4, len(positions)), np.nan)
        if isinstance(scorer, TableScorer):
            measured[0], measured[2] = scorer.nll_at(self.ladder, positions)
        else:
            plans = [self.ladder.plan(row) for row in positions.tolist()]
            measured[0] = scorer.nll_many(plans)
            measured[2] = [*map(scorer.is_predicted, plans)]
        measured[1] = measured[0] - self.measured_start.nll
        return measured

    def compute_rewards(
        self,
        positions: Counts,
        delta_nll_before: Floats,
        ends: Flags,
        fails: Flags,
        start_of: Callable[[int], EpisodeStart],
    ) -> tuple[Floats, dict[str, Floats]]:
        """The measurements and the reward's terms of n steps that are rewarded.

        All missing scores are measured together, those of the baseline's plans included.

        Args:
            positions: The positions of the levels after each step, or the lowest ones if
                `max_steps` ends the episode, (n, items).
            delta_nll_before: ΔNLL of the plans before, NaN where it was not measured, (n,).
            ends: Whether the episode ends with the step, (n,).
            fails: Whether it is truncated, over its budget, (n,).
            start_of: Gives the start of the episode of a step, by its number.

        Returns:
            The fields of `Measurement`, (4, n), and the terms by name, (n,) each.
        """
        count, compared = len(positions), np.zeros(0, dtype=np.int64)
        if self._baseline is not None and ends.any():
            (compared,) = ends.nonzero()
            plans = [self._baseline(start_of(number)) for number in compared.tolist()]
            baselines = np.array([self.ladder.positions(plan) for plan in plans])
            positions = np.concatenate([positions, baselines])
        measured = self.measure(positions)
        measured[3, compared] = measured[1, count:]
        measured = measured[:, :count]
        plans = []
        if self._rewards_tasks:
            plans = [self.ladder.plan(row) for row in positions[:count].tolist()]
        fails = fails & self._worst
        outcome = StepOutcome(plans, measured[1], delta_nll_before, ends, measured[3], fails)
        return measured, self.reward.step(outcome)

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
            return self._feasible(self._start_at(*self._draw([rng]), 0))
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
                f"{start.costs.native_peak_bytes:,} bytes), so there is nothing to {self._verb}; "
                "give a smaller budget."
            )
        return (
            f"The lowest levels need no fewer bytes than the native model for {start.request}, so "
            "there is nothing to lower; give a longer sequence, or name other levels."
        )

    def start_many(
        self, rngs: Sequence[np.random.Generator], request: Any = None
    ) -> tuple[StackedCosts, Counts, Counts]:
        """What `start_episode` gives with each generator, or for one request that a user passed.

        Returns:
            The bytes of the requests, their budgets, and the budgets before they were raised,
            0 where they were not, (n,) each.
        """
        if request is not None:
            count, make = len(rngs), self.encoder.ladder_bytes.stacked
            start = self.start_episode(rngs[0], {"request": request})
            shape = np.array([[start.request.batch_size], [start.request.seq_len_tokens]])
            budgets = np.full(count, start.request.budget_bytes)
            asked = np.full(count, start.asked_budget_bytes or 0)
            return make(*shape.repeat(count, axis=1)), budgets, asked
        costs, asked = self._draw(rngs)
        budgets = np.maximum(asked, costs.least_peak_bytes)
        return costs, budgets, asked * (budgets > asked)

    def _draw(self, rngs: Sequence[np.random.Generator]) -> tuple[StackedCosts, Counts]:
        """A request of the workload from each generator, as its bytes and its budget, (n,) each.

        Requests for which there is nothing to do, or that cannot be met, are drawn again, so
        that one unlucky draw does not end a training.
        """
        make = self.encoder.ladder_bytes.stacked
        batch_sizes, lengths, budgets = self.sampler.sample_many(rngs)
        costs = make(batch_sizes, lengths)
        for _ in range(_MAX_DRAWS - 1):
            again = self._useless(costs, budgets).nonzero()[0]
            if not len(again):
                return costs, budgets
            drawn = self.sampler.sample_many([rngs[row] for row in again.tolist()])
            batch_sizes, lengths, budgets[again] = drawn
            costs.put(again, make(batch_sizes, lengths))
        useless = self._useless(costs, budgets)
        if useless.any():
            raise self._undrawable(self._start_at(costs, budgets, int(useless.argmax())))
        return costs, budgets

    def _start_at(self, costs: StackedCosts, budgets: Counts, number: int) -> EpisodeStart:
        """The start with one of several requests, whose budget may have to be raised yet."""
        shape = int(costs.batch_sizes[number]), int(costs.seq_lens_tokens[number])
        request = Request(*shape, int(budgets[number]))
        return EpisodeStart(request, self.encoder.ladder_bytes.costs_of(costs, number))

    def _useless(self, costs: StackedCosts, budgets: Counts) -> Flags:
        """Requests for which there is nothing to do, or that cannot be met, (n,)."""
        least, native = costs.least_peak_bytes, costs.native_peak_bytes
        useless = (native <= budgets) | (least >= native)
        return useless if self._infeasible == "clip" else useless | (least > budgets)

    def draw_ahead(self, rng: np.random.Generator, count: int) -> list[tuple[int, EpisodeStart]]:
        """The starts of the next episodes, with the number of requests drawn for each."""
        batch_sizes, lengths, budgets = self.sampler.sample_ahead(rng, count)
        costs = self.encoder.ladder_bytes.stacked(batch_sizes, lengths)
        return [
            (number + 1, self._feasible(self._start_at(costs, budgets, number)))
            for number in np.flatnonzero(~self._useless(costs, budgets)).tolist()
        ]

    def _undrawable(self, start: EpisodeStart) -> RapError:
        """The error if no request of the workload can start an episode, the last one included."""
        if not start.is_pointless:
            self.encoder.ladder_bytes.check_feasible(start.request)
        return InvalidRequestError(
            f"None of {_MAX_DRAWS} requests of the workload needs an episode. "
            f"{self._pointless(start)}"
        )

    def _feasible(self, start: EpisodeStart) -> EpisodeStart:
        """The start with its budget raised, if necessary, to one that can be met."""
        if start.feasible:
            return start
        asked, costs = start.request.budget_bytes, start.costs
        if self._infeasible == "error":
            self.encoder.ladder_bytes.check_feasible(start.request)
        raised = replace(start.request, budget_bytes=costs.least_peak_bytes)
        return EpisodeStart(raised, costs, asked)


class StartQueue:
    """Draws the starts of episodes ahead, several at once, from one generator.

    Args:
        task: What starts episodes.
        rng: The generator.
    """

    def __init__(self, task: PruningTask, rng: np.random.Generator) -> None:
        self._task, self._rng = task, rng
        self._before: Mapping[str, Any] | None = None
        self._drawn, self._starts = 0, list[tuple[int, EpisodeStart]]()
        self._count = 0  # few at first, because each reset with a seed begins a queue

    def next(self) -> EpisodeStart:
        """The next start; errors are those of `PruningTask.start_episode`."""
        if not self._starts:
            if self._drawn < self._count:  # the last requests of a batch were of no use
                self.rewind()
            self._drawn, self._count = 0, min(_AHEAD, max(1, 4 * self._count))
            self._before = self._rng.bit_generator.state
            self._starts = self._task.draw_ahead(self._rng, self._count)[::-1]
            if not self._starts:
                self.rewind()
                return self._task.start_episode(self._rng, None)
        self._drawn, start = self._starts.pop()
        return start

    def rewind(self) -> None:
        """Restore the state that the generator has without what is drawn ahead."""
        if self._before is not None:
            self._rng.bit_generator.state = self._before
        if self._drawn:
            self._task.sampler.sample_ahead(self._rng, self._drawn)
        self._before, self._drawn, self._starts = None, 0, []


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

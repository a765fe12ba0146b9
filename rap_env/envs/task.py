"""Parts that environments of one model share: workload, measurements, rewards and observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from rap_env.blocks import BlockMask, block_name
from rap_env.context.opening import open_context
from rap_env.envs.config import EnvConfig
from rap_env.envs.episode import EpisodeStart, Measurement
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.observation import ObservationBuilder
from rap_env.request import Request
from rap_env.reward import MeasuresAccuracy, StepOutcome, make_reward
from rap_env.specs import check_settings
from rap_env.workload import RequestSampler, make_sampler

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

TASK_DOCUMENTS = 20
"""Documents of each task in an accuracy reward: 3 tasks of 20 take seconds per mask on a CPU."""

_MAX_DRAWS = 100

BaselineMask = Callable[[EpisodeStart], BlockMask]
"""Returns the mask that a baseline has for the request of an episode."""

_task_scorers: WeakKeyDictionary[PruningContext, dict[Any, MeasuresAccuracy]] = WeakKeyDictionary()


class RewardedStep(NamedTuple):
    """A step that is rewarded, before anything is measured.

    Attributes:
        start: The request of its episode and what it costs.
        mask: The mask after the step.
        delta_nll_before: ΔNLL of the mask before the step, or None if it was not measured.
        ends: Whether the episode ends with this step.
    """

    start: EpisodeStart
    mask: BlockMask
    delta_nll_before: float | None
    ends: bool


class PruningTask:
    """The parts of an environment that do not depend on an episode; many environments share one.

    Attributes:
        sampler: Draws requests; each sub-environment gets its own `clone`.
        reward: The reward; see `compute_rewards`.
        observations: Builds observations.
        invalid_action_penalty: What an invalid action costs.
        max_invalid_actions: Number of invalid actions that ends an episode.
        num_blocks: 2L, which is also the number of actions.
    """

    def __init__(self, config: EnvConfig, context: PruningContext | None = None) -> None:
        if context is not None and not hasattr(context, "scorer"):
            raise InvalidRequestError(
                f"context must be a pruning context, not {context!r}; make one with "
                "rap_env.context.open_context(ContextConfig(...)), or pass None."
            )
        self.context = open_context(config.context_config()) if context is None else context
        self.memory = self.context.memory
        self.num_blocks = self.memory.facts.num_blocks
        self.sampler = make_sampler(config.workload, self.memory)
        self.reward = make_reward(config.reward, lambda: task_scorer(self.context, config.tasks))
        self.observations = ObservationBuilder(self.memory, self.context.features)
        self.invalid_action_penalty = float(config.invalid_action_penalty)
        self.max_invalid_actions = int(config.max_invalid_actions)
        self._infeasible = config.infeasible
        self._baseline_mask = _baseline_mask(self.reward.relative_to, self.context)

    @cached_property
    def dense(self) -> Measurement:
        """The measurement of the dense model."""
        nll = self.context.scorer.dense_nll
        return Measurement(nll, 0.0, self.context.scorer.is_predicted(BlockMask()))

    def measure(self, masks: Sequence[BlockMask]) -> list[Measurement]:
        """Measure masks; missing scores are measured together."""
        scorer, dense_nll = self.context.scorer, self.dense.nll
        scores = zip(masks, scorer.nll_many(masks), strict=True)
        return [
            Measurement(nll, nll - dense_nll, scorer.is_predicted(mask)) for mask, nll in scores
        ]

    def compute_rewards(
        self, steps: Sequence[RewardedStep]
    ) -> list[tuple[Measurement, dict[str, float]]]:
        """The measurement of each step's mask, and the reward's terms by name.

        All missing scores are measured together, those of the baseline's masks included.
        """
        baselines: dict[int, BlockMask] = {}
        if self._baseline_mask is not None:
            baselines = {n: self._baseline_mask(s.start) for n, s in enumerate(steps) if s.ends}
        measured = self.measure([*(step.mask for step in steps), *baselines.values()])
        of_baselines = dict(zip(baselines, measured[len(steps) :], strict=True))
        rewarded = []
        for number, (step, measurement) in enumerate(zip(steps, measured, strict=False)):
            if number in of_baselines:
                baseline = of_baselines[number].delta_nll
                measurement = measurement._replace(baseline_delta_nll=baseline)
            outcome = StepOutcome(
                step.mask,
                measurement.delta_nll,
                step.delta_nll_before,
                step.ends,
                measurement.baseline_delta_nll,
            )
            rewarded.append((measurement, self.reward.step(outcome)))
        return rewarded

    def start_episode(
        self, sampler: RequestSampler, rng: np.random.Generator, options: Mapping[str, Any] | None
    ) -> EpisodeStart:
        """The start of an episode with a request from the sampler, or the one in `options`."""
        options = reset_options(options)
        check_settings(options, "reset", ["request"])
        if options.get("request") is None:
            return self._feasible(self._draw(sampler, rng))
        start = EpisodeStart.of(self.memory, _request_of(options["request"], self.memory))
        if start.fits_dense:
            raise InvalidRequestError(
                f"The dense model already fits {start.request} (it needs "
                f"{start.costs.dense_peak_bytes:,} bytes), so there is nothing to remove; give a "
                "smaller budget."
            )
        return self._feasible(start)

    def unknown_action(self, action: object) -> UnknownNameError:
        """The error for an action that does not exist."""
        last = self.num_blocks - 1
        known = [f"0 ({block_name(0)}) ... {last} ({block_name(last)})"]
        return UnknownNameError("action", action, known)

    def _draw(self, sampler: RequestSampler, rng: np.random.Generator) -> EpisodeStart:
        """A request of the workload that needs pruning: else the episode would end at its start."""
        for _ in range(_MAX_DRAWS):
            start = EpisodeStart.of(self.memory, sampler.sample(rng))
            if not start.fits_dense:
                return start
        raise InvalidRequestError(
            f"The dense model fits each of {_MAX_DRAWS} requests drawn from the workload, the "
            f"last one {start.request}; give the workload smaller budgets."
        )

    def _feasible(self, start: EpisodeStart) -> EpisodeStart:
        """The start with its budget raised, if necessary, to one that some mask can meet."""
        asked, costs = start.request.budget_bytes, start.costs
        if asked >= costs.least_peak_bytes:
            return start
        if self._infeasible == "error":
            self.memory.check_feasible(start.request)
        raised = replace(start.request, budget_bytes=costs.least_peak_bytes)
        return EpisodeStart(raised, costs, asked)


def task_scorer(
    context: PruningContext, tasks: Sequence[str] | Mapping[str, Any] | None
) -> MeasuresAccuracy:
    """The scorer of task accuracies on a context; one for each set of tasks.

    Args:
        context: The model and the score store.
        tasks: Names of tasks, dict of `TaskConfig` settings, or None for the generated ones.
            Without a ``limit``, `TASK_DOCUMENTS` documents of each are used.
    """
    from rap_env.scoring.generated_tasks import GENERATED_TASKS
    from rap_env.scoring.tasks import TaskConfig, TaskScorer

    given = dict(tasks) if isinstance(tasks, Mapping) else {"names": tasks} if tasks else {}
    check_settings(given, "the tasks", [entry.name for entry in fields(TaskConfig)])
    settings = {"names": tuple(GENERATED_TASKS), "limit": TASK_DOCUMENTS, **given}
    if not isinstance(settings["names"], str):
        settings["names"] = tuple(settings["names"])
    config = TaskConfig(**settings)
    scorers = _task_scorers.setdefault(context, {})
    if config not in scorers:  # building the requests of a task takes seconds
        scorers[config] = TaskScorer(context.llm, config, store=context.store)
    return scorers[config]


def _baseline_mask(name: str | None, context: PruningContext) -> BaselineMask | None:
    """The masks of the baseline that a reward is relative to; None if it is to none."""
    if name is None:
        return None
    if name == "frontier":
        return _from_frontier(context)
    if name == "one_shot":
        order = np.argsort(np.asarray(context.one_shot.delta_nll), kind="stable").tolist()
    elif context.features.gsi_rank.any():
        order = context.gsi.full_order
    else:  # zeros: importance="none"
        raise InvalidRequestError(
            "A reward relative to 'gsi' needs the GSI order, but importance='none' leaves it out; "
            "use importance='gsi', or relative_to='one_shot'."
        )
    return lambda start: start.costs.remove_until_fits(order, start.request.budget_bytes)


def _from_frontier(context: PruningContext) -> BaselineMask:
    frontier = context.frontier

    def best(start: EpisodeStart) -> BlockMask:
        found = frontier.best(context.memory, start.request)
        if found is None:
            raise InvalidRequestError(
                f"No mask of the frontier fits {start.request}, so a reward cannot be relative to "
                "it; build the frontier for smaller budgets too, or give the workload larger ones."
            )
        return found

    return best


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

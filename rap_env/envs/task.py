"""What environments of one model share: what is drawn, measured, seen and paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rap_env.blocks import BlockMask, block_name
from rap_env.costs import RequestCosts, request_costs
from rap_env.envs.parts import check_choices, open_env_context, request_of, task_scorer
from rap_env.envs.reference import make_reference
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.observation import ObservationBuilder
from rap_env.request import Request
from rap_env.reward import Outcome, make_reward
from rap_env.specs import check_settings
from rap_env.workload import RequestSampler, make_sampler

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

_MOST_DRAWS = 100


class Measured(NamedTuple):
    """What the model said of a mask.

    Attributes:
        nll: NLL in nats per token.
        loss: NLL less the dense model's.
        predicted: The score is the prediction of a score table, not a measurement.
        baseline_loss: Loss of the mask that the reward's baseline has for the same request, or
            None where the reward did not ask for it.
    """

    nll: float
    loss: float
    predicted: bool
    baseline_loss: float | None = None


class Due(NamedTuple):
    """A step that pays, before anything is measured.

    Attributes:
        start: The request of its episode and what it costs.
        mask: The mask after the step.
        loss_before: Loss of the mask before the step, or None if it was not measured.
        ends: The episode ends with this step.
    """

    start: Start
    mask: BlockMask
    loss_before: float | None
    ends: bool


@dataclass(frozen=True)
class Start:
    """What an episode begins with: the dense model and this.

    Attributes:
        request: What is to be served.
        costs: What the dense model needs for it, and what each removal frees.
        asked_budget_bytes: The budget before it was raised to the least possible one, or None.
    """

    request: Request
    costs: RequestCosts
    asked_budget_bytes: int | None = None

    @classmethod
    def of(
        cls, memory: MemoryModel, request: Request, asked_budget_bytes: int | None = None
    ) -> Start:
        """The start of an episode with a request that can be met."""
        costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
        return cls(request, costs, asked_budget_bytes)


class PruningTask:
    """The live parts of an environment, without any episode; one serves many environments.

    The arguments are those of `rap_env.RAPPruneEnv`.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        sampler: Draws requests; environments that run side by side take a `twin` each.
        reward: What a step pays; see `pay`.
        observations: What an agent sees.
        penalty: What an invalid action costs.
        most_invalid: Invalid actions that end an episode.
        num_blocks: 2L, which is also the number of actions.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        workload: str | Mapping[str, Any] = "azure-conv",
        reward: str | Mapping[str, Any] = "perplexity",
        calibration: str | Mapping[str, Any] | None = None,
        importance: str = "gsi",
        gsi_removals: int | None = 16,
        gsi_method: str = "exact",
        frontier: str | None = None,
        repair: str = "none",
        tasks: Sequence[str] | Mapping[str, Any] | None = None,
        infeasible: str = "error",
        invalid_action_penalty: float = 0.1,
        max_invalid_actions: int = 10,
        device: str = "auto",
        dtype: str = "auto",
        store: str | None = "default",
        context: PruningContext | None = None,
    ) -> None:
        check_choices(infeasible, invalid_action_penalty, max_invalid_actions)
        self.context = context or open_env_context(
            model=model,
            device=device,
            dtype=dtype,
            calibration=calibration,
            importance=importance,
            gsi_removals=gsi_removals,
            gsi_method=gsi_method,
            frontier=frontier,
            repair=repair,
            store=store,
        )
        self.memory = self.context.memory
        self.num_blocks = self.memory.facts.num_blocks
        self.sampler = make_sampler(workload, self.memory)
        self.reward = make_reward(reward, lambda: task_scorer(self.context, tasks))
        self._reference = make_reference(self.reward.relative_to, self.context)
        self.penalty = float(invalid_action_penalty)
        self.most_invalid = int(max_invalid_actions)
        self.observations = ObservationBuilder(self.memory, self.context.features)
        self._infeasible = infeasible

    @cached_property
    def dense(self) -> Measured:
        """What the model says without any removal.

        Raises:
            NonFiniteScoreError: The dense model gave NaN or infinity.
        """
        nll = self.context.scorer.dense_nll
        return Measured(nll, 0.0, self.context.scorer.is_predicted(BlockMask()))

    def measure(self, masks: Sequence[BlockMask]) -> list[Measured]:
        """What the model says of masks; the missing scores are measured together.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        scorer, dense_nll = self.context.scorer, self.dense.nll
        scores = zip(masks, scorer.nll_many(masks), strict=True)
        return [Measured(nll, nll - dense_nll, scorer.is_predicted(mask)) for mask, nll in scores]

    def pay(self, steps: Sequence[Due]) -> list[tuple[Measured, dict[str, float]]]:
        """What the model says of each step's mask, and the reward's terms by name.

        All missing scores are measured together, those of the baseline's masks included.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
            InvalidRequestError: The frontier that the reward is relative to has no mask that fits.
        """
        baselines: dict[int, BlockMask] = {}
        if self._reference is not None:
            baselines = {
                n: self._reference(step.start) for n, step in enumerate(steps) if step.ends
            }
        found = self.measure([*(step.mask for step in steps), *baselines.values()])
        baseline_loss = {n: one.loss for n, one in zip(baselines, found[len(steps) :], strict=True)}
        paid = []
        for number, (step, measured) in enumerate(zip(steps, found, strict=False)):
            measured = measured._replace(baseline_loss=baseline_loss.get(number))
            outcome = Outcome(
                step.mask, measured.loss, step.loss_before, step.ends, measured.baseline_loss
            )
            paid.append((measured, self.reward.step(outcome)))
        return paid

    def start(
        self, sampler: RequestSampler, rng: np.random.Generator, options: Mapping[str, Any] | None
    ) -> Start:
        """The next episode: a request from the sampler, or the one in `options`.

        Raises:
            InvalidRequestError: The request does not suit the model, or the dense model fits it.
            InfeasibleBudgetError: No mask can meet the budget, and such budgets are refused.
            UnknownNameError: An option that there isn't.
        """
        if not options:
            return self._feasible(self._draw(sampler, rng))
        check_settings(options, "reset", ["request"])
        if options.get("request") is None:
            return self._feasible(self._draw(sampler, rng))
        start = Start.of(self.memory, request_of(options["request"], self.memory))
        if _fits_dense(start):
            raise InvalidRequestError(
                f"The dense model already fits {start.request} (it needs "
                f"{start.costs.dense_peak_bytes:,} bytes), so there is nothing to remove; give a "
                "smaller budget."
            )
        return self._feasible(start)

    def unknown_action(self, action: object) -> UnknownNameError:
        """The error for an action that there is not."""
        last = self.num_blocks - 1
        known = [f"0 ({block_name(0)}) ... {last} ({block_name(last)})"]
        return UnknownNameError("action", action, known)

    def _draw(self, sampler: RequestSampler, rng: np.random.Generator) -> Start:
        """A request of the workload that needs pruning: else the episode would start at its end."""
        for _ in range(_MOST_DRAWS):
            start = Start.of(self.memory, sampler.sample(rng))
            if not _fits_dense(start):
                return start
        raise InvalidRequestError(
            f"The dense model fits each of {_MOST_DRAWS} requests drawn from the workload, the "
            f"last one {start.request}; give the workload smaller budgets."
        )

    def _feasible(self, start: Start) -> Start:
        """The same start with a budget that some mask can meet."""
        asked, costs = start.request.budget_bytes, start.costs
        if asked >= costs.fixed_bytes or asked >= costs.least_peak_bytes:  # the first is cheap
            return start
        if self._infeasible == "error":
            self.memory.check_feasible(start.request)
        return Start(replace(start.request, budget_bytes=costs.least_peak_bytes), costs, asked)


def _fits_dense(start: Start) -> bool:
    return start.costs.dense_peak_bytes <= start.request.budget_bytes

"""Searches that score plans for each request: greedy, beam, whole layers, brute force."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rap_env.errors import SearchTooLargeError
from rap_env.importance.orders import PricedState, cheapest_step, one_shot_costs
from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan, every_mask
from rap_env.policies.method import Basis, CountingScorer, Method, price_per_byte
from rap_env.policies.orders import whole_layer
from rap_env.policies.registry import register
from rap_env.request import Request

MOST_BLOCKS = 12
"""Largest number of blocks for which `Oracle` scores all removals (4,096)."""

_LAZY_BATCH = 6
_CHILDREN = 3  # of each plan of a beam, times its width

StepKey = tuple[int, int, int]
"""What identifies a step: an item, the position of its level and that of its partner's."""


@dataclass(frozen=True)
class _Step:
    """A step that a search may take: an item is lowered, with its companions.

    Attributes:
        plan: The plan after it.
        freed_bytes: Bytes that it frees, shared ones left out.
        rise: Last known ΔNLL of the step, nats per token: measured, or predicted.
        key: What identifies the step.
        tie: By what steps of equal price are sorted.
    """

    plan: Plan
    freed_bytes: int
    rise: float
    key: StepKey
    tie: tuple[int, ...]

    def price(self, rise: float, needed_bytes: int) -> tuple[float, tuple[int, ...]]:
        """Nats per useful byte, by which steps are sorted."""
        return price_per_byte(rise, min(self.freed_bytes, needed_bytes)), self.tie


class Task(NamedTuple):
    """A request, and what a search has measured for it.

    Attributes:
        request: The request.
        costs: The bytes of each item at each level.
        scores: Scores plans; one that was scored before costs nothing.
        rises: ΔNLL of steps that were measured, nats per token.
    """

    request: Request
    costs: LadderCosts
    scores: CountingScorer
    rises: dict[StepKey, float]


class _Search(Method):
    """Extends plans until they fit, and returns the best of all that do.

    Attributes:
        width: Plans that are extended in each round: the best by the rise in NLL per useful
            byte that they free.
    """

    width = 1

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        task = Task(request, self.costs(request), scores, {})
        beam, fitting = [Plan()], list[Plan]()
        while unfit := [plan for plan in beam if not self.fits(plan, request)]:
            children = [child for plan in unfit for child in self._extended(plan, task)]
            if not children:
                return unfit[0]
            fitting += [child for child in children if self.fits(child, request)]
            beam = list(dict.fromkeys([plan for plan in beam if plan not in unfit] + children))
            if self.width > 1:
                beam.sort(key=lambda plan: self._price(plan, scores.nll(plan), task))
            beam = beam[: self.width]
        return scores.best(fitting)

    @abstractmethod
    def _extended(self, plan: Plan, task: Task) -> list[Plan]:
        """The measured plans a step below a plan; the best one if they are compared already."""

    def _price(self, plan: Plan, nll: float, task: Task) -> float:
        """Nats per byte that a plan of this NLL frees, if the request needs them."""
        native_bytes, request = task.costs.dense_peak_bytes, task.request
        freed_bytes = native_bytes - self.memory.peak_bytes(plan, request)
        useful_bytes = min(freed_bytes, native_bytes - request.budget_bytes)
        return price_per_byte(nll - task.scores.nll(Plan()), useful_bytes)


class _StepSearch(_Search):
    """A search that takes measured steps of a ladder.

    Over a ladder with several levels, only the most promising steps are measured; a step that
    was not measured yet is expected to cost its one-shot cost. If blocks are only removed,
    all steps are measured.
    """

    exact = False
    """Whether it measures all steps of a ladder too."""

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self.exact = self.exact or self.ladder.removes_only
        self._one_shot = np.zeros((len(self.ladder), self.ladder.width))
        if not self.exact:
            costs = self.context.level_costs(self.ladder.cache_levels)
            self._one_shot = one_shot_costs(costs, self.ladder)
            self.setup_evaluations = costs.evaluations

    def state(self, costs: LadderCosts, plan: Plan = Plan()) -> PricedState:
        """A plan under a request, by default the native one."""
        return PricedState(costs, self._one_shot, self.ladder.positions(plan))

    def steps(self, state: PricedState, rises: Mapping[StepKey, float]) -> list[_Step]:
        """The steps from a state that free bytes; all steps if none does.

        Args:
            state: The plan under the request.
            rises: ΔNLL of steps that were measured already, nats per token.
        """
        steps = []
        for item in filter(state.is_valid, range(len(self.ladder))):
            if state.companions(item)[0] != item:
                continue  # levels taken together are one step
            key = item, state.positions[item], state.positions[self.ladder.counterparts[item]]
            predicted, freed = state.step_rise(item), state.step_bytes(item)
            plan = self.ladder.plan(state.positions_after(item))
            tie = -freed, -item
            steps.append(_Step(plan, freed, rises.get(key, predicted), key, tie))
        return [step for step in steps if step.freed_bytes > 0] or steps

    def measure(self, plan: Plan, steps: Sequence[_Step], task: Task) -> None:
        """Measure steps from a plan; their ΔNLL are added to those of the task."""
        nll, reached = task.scores.nll(plan), task.scores.nll_many([step.plan for step in steps])
        rises = {step.key: after - nll for step, after in zip(steps, reached, strict=True)}
        task.rises.update(rises)


@register
class GreedyPerByte(_StepSearch):
    """Repeatedly takes the step with the lowest measured rise in NLL per useful byte.

    Bytes are those of the request's own shape, and bytes beyond what it still needs do not
    count: if several blocks each suffice alone, the one with the lowest rise is removed last,
    whatever its size. Over a ladder with several levels, the most promising steps are
    measured in each round, a few at a time, until the best of them is no worse than the last
    known price of the next one (Minoux 1978); where blocks are only removed, all are
    measured.
    """

    name = "greedy_per_byte"

    def _extended(self, plan: Plan, task: Task) -> list[Plan]:
        state = self.state(task.costs, plan)
        needed_bytes = state.peak_bytes - task.request.budget_bytes
        steps = self.steps(state, task.rises)
        expected = {step: step.price(step.rise, needed_bytes) for step in steps}

        def measure(batch: Sequence[_Step]) -> dict[_Step, tuple[float, tuple[int, ...]]]:
            self.measure(plan, batch, task)
            return {step: step.price(task.rises[step.key], needed_bytes) for step in batch}

        size = len(steps) if self.exact else _LAZY_BATCH
        waiting = sorted(steps, key=expected.__getitem__)
        return [cheapest_step(waiting, measure, expected.__getitem__, (size, size)).plan]


@register
class ExactGreedyPerByte(GreedyPerByte):
    """As `GreedyPerByte`, but every step of a ladder is measured in each round."""

    name = "greedy_per_byte-exact"
    exact = True


@register
class Beam(_StepSearch):
    """Beam search over plans by the rise in NLL per useful byte that they free.

    In each round every plan of the beam that does not fit yet is extended by steps, and the
    best plans form the next beam; plans that fit stay as they are. Bytes beyond what the
    request needs do not count, so among plans that fit the NLL decides. The search ends when
    the whole beam fits, and returns the lowest NLL of all measured plans that fit. Over a
    ladder with several levels, only the most promising steps of each plan are measured, three
    times the width of the beam.
    """

    name = "beam"
    width = 4

    def _extended(self, plan: Plan, task: Task) -> list[Plan]:
        steps, nll = self.steps(self.state(task.costs, plan), task.rises), task.scores.nll(plan)
        if not self.exact:
            expected = {step: self._price(step.plan, nll + step.rise, task) for step in steps}
            steps = sorted(steps, key=expected.__getitem__)[: _CHILDREN * self.width]
        self.measure(plan, steps, task)
        return [step.plan for step in steps]


@register
class SLEB(_Search):
    """Repeatedly removes the layer whose removal gives the lowest NLL (Song et al. 2024).

    arXiv 2402.09025, Algorithm 1: after each removal all remaining layers are measured again.
    The order is the same for every request, and each request is charged with the part that it
    uses.
    """

    name = "sleb"

    def _extended(self, plan: Plan, task: Task) -> list[Plan]:
        layers = range(self.memory.facts.num_layers)
        fewer = [plan.without(*whole_layer(n)) for n in layers if 2 * n not in plan.removed]
        return [task.scores.best(fewer)] if fewer else []


@register
class Oracle(Method):
    """Finds the removals of lowest NLL under which the request fits by brute force.

    Plans that remove more than necessary are tried too, since a removal may lower the NLL.
    Requests share the stored scores: with 12 blocks at most 4,096 plans are ever run.

    Raises:
        SearchTooLargeError: The model has more than `MOST_BLOCKS` blocks.
    """

    name = "oracle"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        blocks = self.memory.facts.num_blocks
        if blocks > MOST_BLOCKS:
            raise SearchTooLargeError(
                f"The method 'oracle' scores all removals, but {self.memory.facts.name} has "
                f"{blocks} blocks and so 2^{blocks} of them. Use a model of at most {MOST_BLOCKS} "
                "blocks, or another method such as 'evolutionary'."
            )
        self._masks = list(every_mask(blocks))

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return scores.best([mask for mask in self._masks if self.fits(mask, request)])

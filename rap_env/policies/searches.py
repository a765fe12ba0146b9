"""Searches that score plans for each request: greedy by steps, and by whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rap_env.importance.orders import PricedState, cheapest_step, one_shot_costs
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method, price_per_byte
from rap_env.policies.orders import whole_layer
from rap_env.policies.registry import register
from rap_env.request import Request

_LAZY_BATCH = 6

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


@register
class GreedyPerByte(Method):
    """Repeatedly takes the step with the lowest measured rise in NLL per useful byte.

    Bytes are those of the request's own shape, and bytes beyond what it still needs do not
    count: if several blocks each suffice alone, the one with the lowest rise is removed last,
    whatever its size. Over a ladder with several levels, the most promising steps are
    measured in each round, a few at a time, until the best of them is no worse than the last
    known price of the next one (Minoux 1978); a step that was not measured yet is expected to
    cost its one-shot cost. Where blocks are only removed, all steps are measured.
    """

    name = "greedy_per_byte"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self._one_shot = np.zeros((len(self.ladder), self.ladder.width))
        if not self.ladder.removes_only:
            costs = self.context.level_costs(self.ladder)
            self._one_shot = one_shot_costs(costs, self.ladder)
            self.setup_evaluations = costs.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs, plan, rises = self.costs(request), Plan(), dict[StepKey, float]()
        while not self.fits(plan, request):
            state = PricedState(costs, self._one_shot, self.ladder.positions(plan))
            needed_bytes = state.peak_bytes - request.budget_bytes
            plan = self._cheapest(plan, self._steps(state, rises), needed_bytes, scores, rises)
        return plan

    def _cheapest(
        self,
        plan: Plan,
        steps: Sequence[_Step],
        needed_bytes: int,
        scores: CountingScorer,
        rises: dict[StepKey, float],
    ) -> Plan:
        """The plan after the cheapest step; ΔNLL of measured steps are added to `rises`."""
        expected = {step: step.price(step.rise, needed_bytes) for step in steps}

        def measure(batch: Sequence[_Step]) -> dict[_Step, tuple[float, tuple[int, ...]]]:
            nll, reached = scores.nll(plan), scores.nll_many([step.plan for step in batch])
            rises.update({s.key: after - nll for s, after in zip(batch, reached, strict=True)})
            return {step: step.price(rises[step.key], needed_bytes) for step in batch}

        size = len(steps) if self.ladder.removes_only else _LAZY_BATCH
        waiting = sorted(steps, key=expected.__getitem__)
        return cheapest_step(waiting, measure, expected.__getitem__, (size, size)).plan

    def _steps(self, state: PricedState, rises: Mapping[StepKey, float]) -> list[_Step]:
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


@register
class CostPerByte(GreedyPerByte):
    """Repeatedly takes the step with the lowest predicted rise in NLL per useful byte.

    As `GreedyPerByte`, but nothing is measured: costs are those of levels of single items.
    """

    name = "cost_per_byte"

    def _cheapest(
        self,
        plan: Plan,
        steps: Sequence[_Step],
        needed_bytes: int,
        scores: CountingScorer,
        rises: dict[StepKey, float],
    ) -> Plan:
        return min(steps, key=lambda step: step.price(step.rise, needed_bytes)).plan


@register
class SLEB(Method):
    """Repeatedly removes the layer whose removal gives the lowest NLL (Song et al. 2024).

    arXiv 2402.09025, Algorithm 1: after each removal all remaining layers are measured again.
    The order is the same for every request, and each request is charged with the part that it
    uses.
    """

    name = "sleb"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        layers, plan = range(self.memory.facts.num_layers), Plan()
        while not self.fits(plan, request):
            kept = (n for n in layers if 2 * n not in plan.removed)
            plan = scores.best([plan.without(*whole_layer(n)) for n in kept])
        return plan

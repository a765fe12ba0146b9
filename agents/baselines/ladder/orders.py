"""Methods that score nothing per request: orders of steps, the knapsack, random steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agents.baselines.base import CountingScorer
from agents.baselines.ladder.base import LadderBaseline
from rap_env.context.base import item_order, load_plan_frontier
from rap_env.importance.orders import Step
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


class NativeBaseline(LadderBaseline):
    """Lowers nothing; the reference, which seldom fits."""

    name = "dense"
    kv_aware = False

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return Plan()


class LadderRandomBaseline(LadderBaseline):
    """Lowers random items; the same seed and request give the same plan."""

    name = "random"
    seeded = True

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        key = [self.seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        rng, state = np.random.default_rng(key), self.costs(request).state()
        while state.peak_bytes > request.budget_bytes:
            valid = [item for item in range(len(self.ladder)) if state.is_valid(item)]
            state.lower(int(rng.choice(valid)))
        return self.ladder.plan(state.positions)


class _LadderOrderBaseline(LadderBaseline):
    """Follows an order of steps until the request fits."""

    _steps: Sequence[Step]

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.costs(request).lower_until_fits(self._steps, request.budget_bytes)


class LadderOneShotBaseline(_LadderOrderBaseline):
    """Follows the greedy order of one-shot cost per byte, at a reference request."""

    name = "one_shot"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        self._steps = item_order(context, item_bytes, "one_shot").steps
        self.setup_evaluations = context.level_costs(self.ladder.cache_levels).evaluations


class LadderGSIBaseline(_LadderOrderBaseline):
    """Follows the GSI order over items: cost per byte, measured again after each step."""

    name = "gsi"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        self._steps = item_order(context, item_bytes, "gsi").steps
        costs = context.level_costs(self.ladder.cache_levels)
        self.setup_evaluations = costs.evaluations + context.item_gsi(item_bytes).evaluations


class LadderKnapsackBaseline(LadderBaseline):
    """Chooses the plan with the least sum of one-shot costs among all plans that fit."""

    name = "knapsack"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        costs = context.level_costs(self.ladder.cache_levels)
        levels = {item.name: item.levels for item in self.ladder.items}
        self._policy = KnapsackPolicy(context.memory, costs, levels=levels)
        self.setup_evaluations = costs.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self._policy.choose(request)


class LadderFrontierBaseline(LadderBaseline):
    """Looks up the measured plan of lowest NLL that fits the request.

    Where no measured plan fits, it chooses the knapsack's plan.

    Raises:
        ArtifactError: There is no table of measured plans, or it is damaged or of another model.
    """

    name = "frontier"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        frontier = load_plan_frontier(context.frontier_path, context.memory)
        self._known = frontier.on(self.ladder)
        self._knapsack = LadderKnapsackBaseline(context, item_bytes)
        self.setup_evaluations, self.table_sha256 = frontier.evaluations, frontier.sha256

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs = self.costs(request)
        if costs.dense_peak_bytes <= request.budget_bytes:
            return Plan()
        found = self._known.best(costs, request.budget_bytes)
        return self._knapsack.choose(request) if found is None else found

"""A search on predicted scores, which runs no model for a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from agents.baselines.base import CountingScorer
from agents.baselines.ladder.base import LadderBaseline
from agents.baselines.ladder.orders import LadderOneShotBaseline
from rap_env.context.base import load_plan_frontier
from rap_env.importance.plan_predictor import fit_plan_predictor
from rap_env.importance.plan_search import PlanSearch
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


_PESSIMISM = 2.0  # a search finds the errors of a predictor


class ScoreModelBaseline(LadderBaseline):
    """Improves the best measured plan and the greedy order's by changes that a predictor rates.

    The predictor is fitted to all plans of the table of measured plans. It is the teacher that a
    policy imitates: all its plans can be reached by the ladder's actions.

    Args:
        context: Memory model, level costs and the table of measured plans.
        item_bytes: The ladder with its bytes.
        seed: Seed of the predictor.

    Raises:
        ArtifactError: There is no table of measured plans, or it is damaged or of another model.
    """

    name = "score_model"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        frontier = load_plan_frontier(context.frontier_path, context.memory)
        costs = context.level_costs(self.ladder.cache_levels)
        self._predictor = fit_plan_predictor(
            frontier.scores, costs, self.ladder, pessimism=_PESSIMISM, seed=seed
        )
        self._known = frontier.on(self.ladder).reached(self.ladder)
        self._greedy = LadderOneShotBaseline(context, item_bytes)
        self.table_sha256 = frontier.sha256
        self.setup_evaluations = frontier.evaluations + costs.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs = self.costs(request)
        if costs.dense_peak_bytes <= request.budget_bytes:
            return Plan()
        starts = [self._greedy.choose(request), self._known.best(costs, request.budget_bytes)]
        search = PlanSearch(self._predictor, costs, request.budget_bytes)
        found = [
            search.improve(np.array(self.ladder.positions(start)))
            for start in starts
            if start is not None
        ]
        return self.ladder.plan(min(found, key=lambda pair: pair[1])[0].tolist())

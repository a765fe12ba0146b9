"""Choices from tables of measured plans: lookups, and a search on scores that a table predicts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from rap_env.errors import ArtifactError
from rap_env.importance.plan_search import PlanSearch, fit_plan_predictor
from rap_env.importance.plan_table import PlanTable
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.levels import CACHE_LADDER, WEIGHT_LEVELS
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import knapsack
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.policies.orders import GSI, OneShot
from rap_env.policies.packaged_files import packaged_file
from rap_env.policies.registry import makes, reads, register
from rap_env.request import Request

_CACHED_CHOICES = 1024
_PESSIMISM = 2.0  # a search finds the errors of a predictor


class TablePolicy(Policy):
    """Looks up the best measured plan that fits.

    Args:
        memory: The model's byte arithmetic.
        table: The measured plans.
        ladder: The levels that its plans may have; None allows all.
        make_fallback: Makes the policy that chooses where no measured plan fits; None chooses
            the smallest one.

    Raises:
        ArtifactError: The table is of a model with another number of layers.
    """

    name = "frontier"
    table: PlanTable

    def __init__(
        self,
        memory: MemoryModel,
        table: PlanTable,
        ladder: Ladder | None = None,
        make_fallback: Callable[[], Policy] | None = None,
    ) -> None:
        if table.num_layers != memory.facts.num_layers:
            raise ArtifactError(
                f"The frontier is of a model with {table.num_layers} layers, but "
                f"{memory.facts.name} has {memory.facts.num_layers}; profile this model."
            )
        self.table = table
        self.setup_evaluations = table.evaluations
        self._bytes = LadderBytes(memory, ladder or _all_levels(memory.facts))
        self._known = table.on(self._bytes.ladder)
        self._make_fallback = make_fallback
        self._cached_choice = lru_cache(maxsize=_CACHED_CHOICES)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the native plan if it fits, else the known plan of least delta_nll that does."""
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.native_peak_bytes <= request.budget_bytes:
            return Plan()
        best = self._known.best(costs, request.budget_bytes)
        if best is not None:
            return best
        if self._make_fallback is not None:
            return self._make_fallback().choose(request)
        smallest = np.argmin(self._known.peak_bytes(costs)) if self._known.plans else None
        return Plan() if smallest is None else self._known.plans[int(smallest)]


def _all_levels(facts: ModelFacts) -> Ladder:
    """All levels that plans of a table may have."""
    caches = CACHE_LADDER if facts.kv_heads else ()
    levels = {"weights": WEIGHT_LEVELS, "caches": caches, "embeddings": WEIGHT_LEVELS[:-1]}
    return Ladder.of(facts, levels)


@makes("frontier")
def _frontier(memory: MemoryModel, basis: Basis | None) -> Policy:
    """On the table of the context, with the GSI order of blocks or the knapsack as a fallback."""
    if basis is None:
        return _read_table(packaged_file("frontier.json"), memory)
    table, ladder = basis.context.frontier, basis.ladder_bytes.ladder
    fallback = partial(GSI, basis) if ladder.removes_only else partial(knapsack, memory, basis)
    policy = TablePolicy(memory, table, ladder, fallback)
    policy.table_sha256 = table.sha256
    return policy


@reads(PlanTable.KIND)
def _read_table(path: Path, memory: MemoryModel) -> Policy:
    return TablePolicy(memory, PlanTable.load(path, memory))


@register
class ScoreModelSearch(Method):
    """Improves the best measured plan and the greedy order's by changes that a predictor rates.

    The predictor is fitted to all plans of the table of measured plans, and runs no model for
    a request. It is the teacher that a policy imitates: all its plans can be reached by the
    ladder's actions.

    Raises:
        ArtifactError: There is no table of measured plans, or it is damaged or of another
            model.
    """

    name = "score_model"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        table = self.context.frontier
        costs = self.context.level_costs(self.ladder)
        self._predictor = fit_plan_predictor(
            table.scores, costs, self.ladder, pessimism=_PESSIMISM, seed=self.seed
        )
        self._known = table.on(self.ladder).reached(self.ladder)
        self._greedy = OneShot(basis)
        self.table_sha256 = table.sha256
        self.setup_evaluations = table.evaluations + costs.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs = self.costs(request)
        starts = [self._greedy.choose(request), self._known.best(costs, request.budget_bytes)]
        search = PlanSearch(self._predictor, costs, request.budget_bytes)
        improved = [
            search.improve(np.array(self.ladder.positions(start)))
            for start in starts
            if start is not None
        ]
        return self.ladder.plan(min(improved, key=lambda pair: pair[1])[0].tolist())

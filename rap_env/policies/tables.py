"""Choices from tables of measured plans: lookups, and a search on scores that a table predicts."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from rap_env.errors import ArtifactError
from rap_env.importance.plan_predictor import fit_plan_predictor
from rap_env.importance.plan_search import PlanSearch
from rap_env.importance.plan_table import KnownPlans, PlanTable
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.named_ladders import CACHE_LEVELS
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import Knapsack
from rap_env.policies.method import CountingScorer, Method
from rap_env.policies.orders import GSI, OneShot
from rap_env.policies.packaged_files import packaged_file
from rap_env.policies.registry import packaged, reads, register
from rap_env.request import Request

_CACHED_CHOICES = 1024
_PESSIMISM = 2.0  # a search finds the errors of a predictor


class TablePolicy(Policy):
    """Looks up the best measured plan that fits, or the smallest known one if none does.

    Args:
        memory: The model's byte arithmetic.
        table: The measured plans; of masks, the best one for each pair of counts is used.

    Raises:
        ArtifactError: The table is of a model with another number of layers.
    """

    name = "frontier"

    def __init__(self, memory: MemoryModel, table: PlanTable) -> None:
        every = {"weights": WEIGHT_LEVELS, "embeddings": WEIGHT_LEVELS[:-1], "caches": CACHE_LEVELS}
        ladder = Ladder.of(memory.facts, "masks" if table.has_masks_only else every)
        if table.num_layers != memory.facts.num_layers:
            raise ArtifactError(
                f"The frontier is of a model with {table.num_layers} layers, but "
                f"{memory.facts.name} has {memory.facts.num_layers}; profile this model."
            )
        self.table = table
        self._bytes = LadderBytes(memory, ladder)
        self._known = known_plans(table, ladder)
        self._cached_choice = lru_cache(maxsize=_CACHED_CHOICES)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the native plan if it fits, else the known plan of least delta_nll that does."""
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes or not self._known.plans:
            return Plan()
        best = self._known.best(costs, request.budget_bytes)
        smallest = self._known.plans[int(np.argmin(self._known.peak_bytes(costs)))]
        return smallest if best is None else best


def known_plans(table: PlanTable, ladder: Ladder) -> KnownPlans:
    """The plans of a table that a ladder has, for lookups."""
    if table.has_masks_only:
        return KnownPlans.of(ladder, dict(table.entries), 0.0)
    return table.on(ladder)


@packaged("frontier")
def _packaged_frontier(memory: MemoryModel) -> Policy:
    return TablePolicy(memory, PlanTable.load(packaged_file("frontier.json"), memory))


@reads(PlanTable.KIND)
def _read_table(path: Path, memory: MemoryModel) -> Policy:
    return TablePolicy(memory, PlanTable.load(path, memory))


@register
class MeasuredTable(Method):
    """Looks up the measured plan of lowest NLL that fits the request.

    Where no measured plan fits, it chooses the knapsack's plan; over masks, the GSI order's.

    Raises:
        ArtifactError: There is no table of measured plans, or it is damaged or of another model; or
            nothing fits, and the context has no GSI order.
    """

    name = "frontier"

    def _prepare(self) -> None:
        table = self.context.frontier
        if not self.removes_only:
            self.table_sha256 = table.sha256
        self._known = known_plans(table, self.ladder)
        self.setup_evaluations = table.evaluations

    @cached_property
    def _fallback(self) -> Method:
        return (GSI if self.removes_only else Knapsack)(self.context, self.item_bytes)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        best = self._known.best(self.costs(request), request.budget_bytes)
        return self._fallback.choose(request) if best is None else best


@register
class ScoreModelSearch(Method):
    """Improves the best measured plan and the greedy order's by changes that a predictor rates.

    The predictor is fitted to all plans of the table of measured plans, and runs no model for a
    request. It is the teacher that a policy imitates: all its plans can be reached by the ladder's
    actions.

    Raises:
        ArtifactError: There is no table of measured plans, or it is damaged or of another model.
    """

    name = "score_model"

    def _prepare(self) -> None:
        table = self.context.frontier
        costs = self.context.level_costs(self.ladder.cache_levels)
        self._predictor = fit_plan_predictor(
            table.scores, costs, self.ladder, pessimism=_PESSIMISM, seed=self.seed
        )
        self._known = table.on(self.ladder).reached(self.ladder)
        self._greedy = OneShot(self.context, self.item_bytes)
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

"""Evolutionary search over plans: level switches at equal bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from agents.baselines.base import CountingScorer
from agents.baselines.evolutionary import MOST_SWITCHES, Evolution
from agents.baselines.ladder.base import LadderBaseline, Positions, level_above, raised
from agents.baselines.ladder.orders import (
    LadderGSIBaseline,
    LadderKnapsackBaseline,
    LadderOneShotBaseline,
)
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


class LadderEvolutionaryBaseline(LadderBaseline):
    """(1 + lambda) evolution of a plan at equal bytes (EvoPress, Sieberling et al. 2024).

    As the search over masks (`agents.baselines.evolutionary`), with level switches: a few items
    are raised by one level, others are lowered until the request fits again, and no item stays
    lower than it must. Caches are lowered one by one, whatever the ladder takes together. The
    first parent is the best of the knapsack's plan, the greedy order's and the GSI order's.

    Args:
        context: Memory model, scorer and importance.
        item_bytes: The ladder with its bytes.
        seed: Seed of the mutations; they depend on the request too.
        max_evaluations: Upper limit of passes over the whole text per request, at least 1; a
            part of the text counts as that part.
    """

    name = "evolutionary"
    seeded = True

    def __init__(
        self,
        context: PruningContext,
        item_bytes: LadderBytes,
        seed: int = 0,
        max_evaluations: int = 500,
    ) -> None:
        super().__init__(context, item_bytes, seed)
        starts = (LadderKnapsackBaseline, LadderOneShotBaseline, LadderGSIBaseline)
        self._starts: list[LadderBaseline] = [start(context, item_bytes) for start in starts]
        self.max_evaluations = max_evaluations
        self.setup_evaluations = max(start.setup_evaluations for start in self._starts)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if self._native_fits(request):
            return Plan()
        costs = self.costs(request).one_by_one
        mutate = partial(mutated, costs, request.budget_bytes)
        search = Evolution(Plan(), mutate, scores, request, self.seed, self.max_evaluations)
        search.begin(list(dict.fromkeys(start.choose(request) for start in self._starts)))
        while search.step():
            pass
        return search.parent


def mutated(
    costs: LadderCosts, budget_bytes: int, parent: Plan, rng: np.random.Generator
) -> Plan | None:
    """Return a plan after a few level switches that fits the budget; None if there is none."""
    ladder = costs.ladder
    start: Positions = tuple(ladder.positions(parent))
    lowered = [item for item in range(len(ladder)) if level_above(costs, start, item) is not None]
    switches = int(rng.integers(1, MOST_SWITCHES + 1, size=2).min())
    chosen = rng.permutation(lowered)[:switches].tolist()
    positions = start
    for item in chosen:
        higher = level_above(costs, positions, item)
        positions = positions if higher is None else higher
    state = costs.state(positions)
    while state.peak_bytes > budget_bytes:
        valid = [n for n in range(len(ladder)) if state.is_valid(n) and n not in chosen]
        if not valid:
            return None
        state.lower(int(rng.choice(valid)))
    order = rng.permutation(len(ladder)).tolist()
    return ladder.plan(raised(costs, tuple(state.positions), order, budget_bytes))

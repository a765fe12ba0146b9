"""Evolutionary search: many small changes of the best plan, most of them scored on few windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import knapsack
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.policies.orders import GSI, OneShot, OneShotPerByte, ascending
from rap_env.policies.registry import register
from rap_env.request import Request

_OFFSPRING = 32
_SURVIVORS = (8, 2)  # plans that pass each stage on a part of the text
_FIRST_PARTS = 8  # parts into which the text is cut for the first stage, fewer if it is short
_OFFSPRING_OF_ONE_WINDOW = 4  # for a text of one window, where every plan costs a whole pass
_MOST_SWITCHES = 3  # of one mutation
_TRIES = 20  # proposals per offspring before the search counts as converged

Mutate = Callable[[Plan, np.random.Generator], Plan | None]
"""Gives a plan near another one that fits the request, or None."""

Positions = tuple[int, ...]


@register
class Evolutionary(Method):
    """(1 + lambda) evolution of a plan at equal bytes (EvoPress, Sieberling et al. 2024).

    arXiv 2410.14649, Algorithm 1: offspring are the parent after a few level switches, here
    items that are raised and others that are lowered until the request fits again; no item
    stays lower than it must. Selection has stages: all offspring are scored on a small part
    of the text, the best of them on a larger part, the last two on all of it, where the
    better one becomes the parent if it beats the parent. Deviations: the parts of the text
    rotate instead of being drawn, the first parent is the best of cheap plans instead of a
    random one, a plan scored on the whole text is never tried again, and the search stops
    early once the neighbourhood of the parent is exhausted. Caches are lowered one by one,
    whatever the ladder takes together.

    Attributes:
        max_evaluations: Upper limit of passes over the whole text per request, at least 1; a
            part of the text counts as that part.
    """

    name = "evolutionary"
    max_evaluations = 500

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        additive = knapsack(self.memory, basis)
        self._starts: list[Policy] = [additive, OneShot(basis), GSI(basis)]
        self._raised_first: list[int] = []
        # Also without the removals that are not needed, dearest first.
        if self.ladder.removes_only:
            self._starts = [GSI(basis), additive, OneShotPerByte(basis)]
            self._raised_first = ascending(-self.context.one_shot.delta_nll)
        # Of the orders that the first parents follow; GSI's first round measures one-shot
        # too.
        self.setup_evaluations = max(start.setup_evaluations for start in self._starts)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs, budget = self.costs(request).one_by_one, request.budget_bytes
        starts = [start.choose(request) for start in self._starts]
        positions = [tuple(self.ladder.positions(plan)) for plan in starts]
        raised = [_raised(costs, plan, self._raised_first, budget) for plan in positions]
        starts += map(self.ladder.plan, raised)
        mutate = partial(_mutated, costs, budget)
        search = Evolution(mutate, scores, self.random(request), self.max_evaluations)
        return search.run(list(dict.fromkeys(starts)))


@dataclass(frozen=True)
class _Stage:
    """Windows of the text on which plans are scored, and how many plans pass."""

    windows: tuple[int, ...]
    survivors: int


class Evolution:
    """The search for one request.

    Args:
        mutate: Proposes plans near the parent.
        scores: Scores plans.
        rng: Draws the mutations.
        max_evaluations: Upper limit of passes over the whole text.

    Attributes:
        parent: The best plan so far.
        nll: Its NLL on the whole text, nats per token.
    """

    def __init__(
        self,
        mutate: Mutate,
        scores: CountingScorer,
        rng: np.random.Generator,
        max_evaluations: int,
    ) -> None:
        self._mutate, self._scores, self._rng = mutate, scores, rng
        self._total = scores.num_windows
        self._windows_left = max_evaluations * self._total
        self._generation = 0
        self._scored: set[Plan] = set()
        self._tried: set[Plan] = set()  # since the current parent was found
        self.parent = Plan()
        self.nll = float("inf")

    def run(self, starts: Sequence[Plan]) -> Plan:
        """Search from the best of some plans that fit, until nothing is left to try or to spend."""
        self._select(starts[: self._windows_left // self._total])
        while self.step():
            pass
        return self.parent

    def step(self) -> bool:
        """Run one generation; False if no plan is left to try or no evaluation to spend."""
        stages = self._stages()
        most = self._affordable(stages)
        offspring = list(self._offspring(most)) if most else []
        if not offspring:
            return False
        self._generation += 1
        for stage in stages:
            self._windows_left -= len(offspring) * len(stage.windows)
            nll = dict(zip(offspring, self._scores.nll_on(offspring, stage.windows), strict=True))
            offspring = sorted(offspring, key=nll.__getitem__)[: stage.survivors]
        self._select(offspring)
        return True

    def _select(self, plans: Sequence[Plan]) -> None:
        """Score plans on the whole text; the best becomes the parent if it beats the parent."""
        self._windows_left -= len(plans) * self._total
        self._scored |= set(plans)
        for nll, plan in zip(self._scores.nll_many(plans), plans, strict=True):
            if nll < self.nll:
                self.parent, self.nll = plan, nll
                # Near a new parent, on other windows, a plan may do better.
                self._tried.clear()

    def _stages(self) -> list[_Stage]:
        """Return the stages on parts of the text; the parts rotate with the generation."""
        first = min(_FIRST_PARTS, self._total)
        parts = [number for number in (first, first // 2) if number > 1]
        return [
            _Stage(tuple(range((self._generation + place) % of, self._total, of)), survivors)
            for place, (of, survivors) in enumerate(zip(parts, _SURVIVORS, strict=False))
        ]

    def _affordable(self, stages: list[_Stage]) -> int:
        """Return how many offspring the next generation may have."""
        most = _OFFSPRING if stages else _OFFSPRING_OF_ONE_WINDOW
        while most and self._cost(stages, most) > self._windows_left:
            most -= 1
        return most

    def _cost(self, stages: list[_Stage], plans: int) -> int:
        """Return the windows that a generation scores."""
        cost = 0
        for stage in stages:
            cost += plans * len(stage.windows)
            plans = min(plans, stage.survivors)
        return cost + plans * self._total

    def _offspring(self, most: int) -> Iterator[Plan]:
        """Yield up to `most` new plans near the parent; fewer once its neighbours are known."""
        for _ in range(most * _TRIES):
            plan = self._mutate(self.parent, self._rng)
            if plan is not None and plan not in self._scored and plan not in self._tried:
                self._tried.add(plan)
                yield plan
                most -= 1
            if not most:
                return


def _mutated(
    costs: LadderCosts, budget_bytes: int, parent: Plan, rng: np.random.Generator
) -> Plan | None:
    """Return a plan after a few level switches that fits the budget; None if there is none.

    Fewer switches are likelier, as in EvoPress.
    """
    ladder = costs.ladder
    positions: Positions = tuple(ladder.positions(parent))
    switches = int(rng.integers(1, _MOST_SWITCHES + 1, size=2).min())
    raised = rng.permutation(_lowered(costs, positions))[:switches].tolist()
    for item in raised:
        positions = _level_above(costs, positions, item) or positions
    state = costs.state(positions)
    while valid := [n for n in range(len(ladder)) if state.is_valid(n) and n not in raised]:
        for item in rng.permutation(valid).tolist():
            if state.peak_bytes <= budget_bytes:
                break
            if state.is_valid(item):  # not removed with its block meanwhile
                state.lower(item)
        if state.peak_bytes <= budget_bytes:
            break
    if state.peak_bytes > budget_bytes:
        return None
    positions = tuple(state.positions)
    order = rng.permutation(_lowered(costs, positions)).tolist()
    return ladder.plan(_raised(costs, positions, order, budget_bytes))


def _lowered(costs: LadderCosts, positions: Positions) -> list[int]:
    """The items that can be raised."""
    items = range(len(positions))
    return [item for item in items if _level_above(costs, positions, item) is not None]


def _raised(
    costs: LadderCosts, positions: Positions, order: Sequence[int], budget_bytes: int
) -> Positions:
    """Raise items, in `order`, to the highest level at which the request still fits.

    Bytes that items share may let an earlier item rise after a later one, so the order is
    repeated until no item can be raised.
    """
    before: Positions | None = None
    while positions != before:
        before = positions
        for item in order:
            higher = _level_above(costs, positions, item)
            while higher is not None:
                if costs.state(higher).peak_bytes <= budget_bytes:
                    positions = higher
                higher = _level_above(costs, higher, item)
    return positions


def _level_above(costs: LadderCosts, positions: Positions, item: int) -> Positions | None:
    """The positions with one item at the level above its own; None if it is native or removed.

    An attention block that returns brings its cache back at the level that most caches have.
    """
    cache_position = None
    if positions[item] == costs.ladder.removals[item]:
        removed = costs.ladder.removed_cache
        kept = Counter(p for cache in costs.ladder.caches if (p := positions[cache]) < removed)
        cache_position = max(kept, key=lambda position: (kept[position], -position), default=0)
    higher = costs.steps.raised(positions, item, cache_position)
    return None if higher is None else tuple(higher)

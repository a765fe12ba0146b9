"""Orders in which to lower the items of a ladder: predicted from one-shot costs, without torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.profiles import GSIProfile
from rap_env.ladder.features import ItemImportance
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts, LadderState
from rap_env.ladder.steps import LevelSteps

REFERENCE_SHAPE = 4, 1024
"""Batch size and tokens at which an order weighs costs against bytes; fewer tokens for
shorter models."""

LoweringStep = tuple[int, int]
"""The number of an item, and the position of the level that it gets."""

Floats = npt.NDArray[np.float64]

S = TypeVar("S", bound=Hashable)
P = TypeVar("P", bound=tuple[Any, ...])


@dataclass(frozen=True, eq=False)
class LadderOrder:
    """An order of all steps of a ladder: an item's steps go from its highest level down.

    Attributes:
        ladder: The items.
        one_shot: ΔNLL if only this item has this level, nats per token, (items, W).
        steps: The steps.
        rises: ΔNLL that each step adds, nats per token; at least 0.
    """

    ladder: Ladder
    one_shot: Floats
    steps: tuple[LoweringStep, ...]
    rises: tuple[float, ...]

    @property
    def importance(self) -> ItemImportance:
        """The order as an agent observes it."""
        place, reached = np.zeros_like(self.one_shot), np.zeros_like(self.one_shot)
        last = max(1, len(self.steps) - 1)
        for number, ((item, position), rise) in enumerate(zip(self.steps, self.rises, strict=True)):
            place[item, position] = number / last
            reached[item, position:] = reached[item, position - 1] + rise
        return ItemImportance(self.one_shot, place, reached)


class PricedState(LadderState):
    """A plan that is lowered step by step, with its bytes and predicted costs.

    Args:
        costs: The bytes of a request.
        one_shot: ΔNLL if only this item has this level, nats per token, (items, W); a plan's
            costs are their sums.
        positions: As for `LadderState`.
    """

    def __init__(
        self, costs: LadderCosts, one_shot: Floats, positions: Sequence[int] | None = None
    ) -> None:
        super().__init__(costs, positions)
        self._rises: list[list[float]] = one_shot.tolist()

    def step_bytes(self, item: int, lower: int | None = None) -> int:
        """Bytes that are freed if an item, with its companions, goes to a level (the next one)."""
        lower = self._next(item) if lower is None else lower
        return -int(sum(self._change(self.costs.sizes, n, lower) for n in self.companions(item)))

    def step_rise(self, item: int, lower: int | None = None) -> float:
        """Predicted ΔNLL, at least 0, if an item, with its companions, goes to a level."""
        lower = self._next(item) if lower is None else lower
        return sum(max(0.0, self._change(self._rises, n, lower)) for n in self.companions(item))

    def price(self, item: int) -> float:
        """Cost per freed byte of the best level that lies below an item's level."""
        best = float("inf")
        for lower in range(self._next(item), len(self.costs.ladder.items[item].levels)):
            freed = self.step_bytes(item, lower)
            best = min(best, self.step_rise(item, lower) / freed) if freed > 0 else best
        return best

    def steps(self, item: int) -> list[tuple[LoweringStep, float]]:
        """The steps of lowering an item with its companions, with their predicted ΔNLL."""
        return [
            ((n, self._next(n)), max(0.0, self._change(self._rises, n, self._next(n))))
            for n in self.companions(item)
        ]

    def _next(self, item: int) -> int:
        return self.costs.steps.nexts[item][self.positions[item]]

    def _change(self, values: list[list[float]] | list[list[int]], item: int, lower: int) -> float:
        """What a lower level of an item adds to the sum of some values of all levels."""
        moves = self.costs.steps.own_moves_to(item, lower)
        return sum(values[moved][p] - values[moved][self.positions[moved]] for moved, p in moves)


def reference_costs(
    ladder_bytes: LadderBytes, shape: tuple[int, int] = REFERENCE_SHAPE
) -> LadderCosts:
    """Bytes of a batch size and tokens of each sequence; steps skip no level."""
    batch_size, tokens = shape
    costs = ladder_bytes.costs(batch_size, min(tokens, ladder_bytes.memory.facts.max_positions))
    return replace(costs, steps=LevelSteps.every(ladder_bytes.ladder))


def greedy_order(
    costs: LevelCosts,
    ladder_bytes: LadderBytes,
    measured: GSIProfile | None = None,
    shape: tuple[int, int] = REFERENCE_SHAPE,
) -> LadderOrder:
    """Start with native levels, and repeatedly take the step of the least cost per freed byte.

    Costs are predicted (see `PricedState`), so nothing is measured on the way. A step counts
    as the best of the levels to which it leads, so that a poor level on the way to a good one
    does not hold an item back. Steps that free nothing come last.

    Args:
        costs: One-shot costs of the levels.
        ladder_bytes: The ladder and its bytes.
        measured: A GSI order with which the order begins. The ΔNLL of steps that are taken
            together is divided in proportion to their predicted ones.
        shape: Batch size and tokens of the request whose bytes count.

    Raises:
        ArtifactError: The GSI order is of another ladder.
    """
    ladder = ladder_bytes.ladder
    one_shot = one_shot_costs(costs, ladder)
    state = PricedState(reference_costs(ladder_bytes, shape), one_shot)
    ordered = [] if measured is None else _measured_steps(state, measured)
    prices: dict[int, float] = {}
    changed: Iterable[int] = range(len(ladder))
    while True:
        for item in changed:
            prices.pop(item, None)
            if state.is_valid(item):
                prices[item] = state.price(item)
        if not prices:
            break
        cheapest = min(prices, key=lambda item: (prices[item], item))
        ordered += state.steps(cheapest)
        changed = state.lower(cheapest)
    steps, rises = zip(*ordered, strict=True)
    return LadderOrder(ladder, one_shot, steps, tuple(max(0.0, rise) for rise in rises))


def by_level(steps: Iterable[LoweringStep]) -> list[LoweringStep]:
    """An order of steps in which those of each item go from its highest level down.

    Each item keeps the places that its steps have.
    """
    steps = [*steps]
    own = {item: iter([*group]) for item, group in groupby(sorted(steps), key=itemgetter(0))}
    return [next(own[item]) for item, _ in steps]


def _measured_steps(state: PricedState, profile: GSIProfile) -> list[tuple[LoweringStep, float]]:
    """The steps of a GSI order with their measured ΔNLL; takes them."""
    ladder = state.costs.ladder
    check_ladder(profile, ladder)
    ordered, before = list[tuple[LoweringStep, float]](), profile.dense_nll
    for name, nll in zip(profile.order, profile.nll_after, strict=True):
        item = ladder.numbers[name]
        steps = state.steps(item)
        predicted = sum(rise for _, rise in steps)
        for step, rise in steps:
            share = rise / predicted if predicted > 0 else 1 / len(steps)
            ordered.append((step, (nll - before) * share))
        state.lower(item)
        before = nll
    return ordered


def cheapest_step(
    steps: Sequence[S],
    measure: Callable[[Sequence[S]], Mapping[S, P]],
    expected_price: Callable[[S], P],
    batches: tuple[int, int],
) -> S:
    """The step of the least measured price; not all steps need to be measured.

    Steps are measured until the best of them is no dearer than the next one is expected to be
    (lazy evaluation, Minoux 1978). That is exact if prices only rise above the expected ones.

    Args:
        steps: At least one, in the order in which they are measured.
        measure: Gives the prices of some steps; may leave out those that cannot be the best.
        expected_price: The last known price of a step; not called if the first batch has all.
        batches: Steps that are measured at first, and then at a time.
    """
    size, next_size = batches
    prices: dict[S, P] = {}
    while True:
        prices |= measure(steps[:size])
        steps, size = steps[size:], next_size
        best = min(prices, key=prices.__getitem__)
        if not steps or prices[best] <= expected_price(steps[0]):
            return best


def check_ladder(profile: GSIProfile, ladder: Ladder) -> None:
    """Raise an `ArtifactError` unless a profile is of a ladder."""
    levels = {item.name: list(item.levels) for item in ladder.items}
    if (profile.levels, profile.together) != (levels, ladder.together):
        raise ArtifactError(
            "The GSI profile was measured for other levels; give the levels that it was measured "
            "for, or measure another one."
        )


def one_shot_costs(costs: LevelCosts, ladder: Ladder) -> Floats:
    """ΔNLL if only this item has this level, nats per token, (items, W).

    A level that was not measured, because it changes nothing on the text, costs as much as
    the one above it.
    """
    table = np.zeros((len(ladder), ladder.width))
    for number, item in enumerate(ladder.items):
        measured = costs.costs.get(item.name, {})
        for position, level in enumerate(item.levels[1:], start=1):
            table[number, position] = (
                costs.cost(item.name, level) if level in measured else table[number, position - 1]
            )
    return table

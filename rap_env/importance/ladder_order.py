"""Orders in which to lower the items of a ladder; the greedy one follows one-shot costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.item_observation import ItemImportance
from rap_env.ladder.items import Ladder
from rap_env.plan import Plan

REFERENCE_BATCH_SIZE, REFERENCE_TOKENS = 4, 1024
"""The request at which an order weighs costs against bytes; fewer tokens for shorter models."""

Step = tuple[int, int]
"""The number of an item, and the position of the level that it gets."""


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
    one_shot: npt.NDArray[np.float64]
    steps: tuple[Step, ...]
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


class LadderWalk:
    """A plan on a ladder that is lowered step by step, with predicted costs and exact bytes.

    No level is skipped. Costs are sums of one-shot costs (`LevelCosts`); bytes are those at one
    reference request, `REFERENCE_BATCH_SIZE` sequences of `REFERENCE_TOKENS` tokens.

    Attributes:
        ladder: The items.
        one_shot: As in `LadderOrder`.
        positions: The position of each item's level, (items,).
    """

    def __init__(self, costs: LevelCosts, item_bytes: LadderBytes) -> None:
        self.ladder = ladder = item_bytes.ladder
        self.one_shot = one_shot_costs(costs, ladder)
        self.positions = [0] * len(ladder)
        tokens = min(REFERENCE_TOKENS, item_bytes.memory.facts.max_positions)
        self._sizes = item_bytes.costs(REFERENCE_BATCH_SIZE, tokens).sizes
        self._costs: list[list[float]] = self.one_shot.tolist()

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self.ladder.plan(self.positions)

    def next_of(self, item: int) -> int:
        """The position of an item's next level, -1 if there is none."""
        lower = self.positions[item] + 1
        return lower if lower < len(self.ladder.items[item].levels) else -1

    def takers(self, item: int) -> list[int]:
        """The items that are lowered with one, itself included."""
        return self.ladder.every_step.companions(self.positions, item)

    def freed_bytes(self, item: int, lower: int) -> int:
        """Bytes that are freed if an item, and all taken with it, goes to a level."""
        return -int(sum(self._change(self._sizes, one, lower) for one in self.takers(item)))

    def rise(self, item: int, lower: int) -> float:
        """Predicted ΔNLL, at least 0, if an item, and all taken with it, goes to a level."""
        return sum(max(0.0, self._change(self._costs, one, lower)) for one in self.takers(item))

    def price(self, item: int) -> float:
        """Cost per freed byte of the best level that lies below an item's level."""
        best = float("inf")
        for lower in range(self.next_of(item), len(self.ladder.items[item].levels)):
            freed = self.freed_bytes(item, lower)
            best = min(best, self.rise(item, lower) / freed) if freed > 0 else best
        return best

    def steps(self, item: int) -> list[tuple[Step, float]]:
        """The steps of lowering an item, and all taken with it, with their predicted ΔNLL."""
        return [
            ((one, self.next_of(one)), max(0.0, self._change(self._costs, one, self.next_of(one))))
            for one in self.takers(item)
        ]

    def take(self, steps: Iterable[Step]) -> set[int]:
        """Take steps.

        Returns:
            The items whose next step changed.
        """
        changed: set[int] = set()
        for item, position in steps:
            self.positions[item] = position
            partner = self.ladder.partners[item]
            if position == self.ladder.removals[item] and partner != item:
                self.positions[partner] = len(self.ladder.items[partner].levels)
            changed |= {item, partner}
        return changed

    def _change(self, values: list[list[float]] | list[list[int]], item: int, lower: int) -> float:
        """What a lower level of an item adds to the sum of some values of all levels."""
        partner = self.ladder.partners[item]
        taken = lower == self.ladder.removals[item] and partner != item  # its cache goes too
        less = values[partner][self.positions[partner]] if taken else 0
        return values[item][lower] - values[item][self.positions[item]] - less


def greedy_order(
    costs: LevelCosts, item_bytes: LadderBytes, first: Iterable[tuple[Step, float]] = ()
) -> LadderOrder:
    """Start with native levels, and repeatedly take the step of the least cost per freed byte.

    Costs are predicted (see `LadderWalk`), so nothing is measured again on the way. A step counts
    as the best of the levels to which it leads, so that a poor level on the way to a good one does
    not hold an item back. Steps that free nothing come last.

    Args:
        costs: One-shot costs of the levels.
        item_bytes: The ladder and its bytes.
        first: Steps with which the order begins, with the ΔNLL that they add.
    """
    walk = LadderWalk(costs, item_bytes)
    taken = list(first)
    walk.take(step for step, _ in taken)
    prices = {n: walk.price(n) for n in range(len(walk.ladder)) if walk.next_of(n) >= 0}
    while prices:
        cheapest = min(prices, key=lambda one: (prices[one], one))
        steps = walk.steps(cheapest)
        taken += steps
        for item in walk.take(step for step, _ in steps):
            prices.pop(item, None)
            if walk.next_of(item) >= 0:
                prices[item] = walk.price(item)
    return LadderOrder(
        walk.ladder,
        walk.one_shot,
        tuple(step for step, _ in taken),
        tuple(max(0.0, rise) for _, rise in taken),
    )


def one_shot_costs(costs: LevelCosts, ladder: Ladder) -> npt.NDArray[np.float64]:
    """ΔNLL if only this item has this level, nats per token, (items, W).

    A level that was not measured, because it changes nothing on the text, costs as much as the one
    above it.
    """
    found = np.zeros((len(ladder), ladder.width))
    for number, item in enumerate(ladder.items):
        measured = costs.one_shot.get(item.name, {})
        for position, level in enumerate(item.levels[1:], start=1):
            found[number, position] = (
                costs.cost(item.name, level) if level in measured else found[number, position - 1]
            )
    return found

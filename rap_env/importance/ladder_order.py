"""An order in which to lower the items of a ladder, from what each level costs alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.item_observation import ItemImportance
from rap_env.ladder.items import Ladder

REFERENCE_BATCH_SIZE, REFERENCE_TOKENS = 4, 1024
"""The request at which an order weighs costs against bytes; fewer tokens for shorter models."""


@dataclass(frozen=True, eq=False)
class LadderOrder:
    """An order of all steps of a ladder: an item's steps go from its highest level down.

    Attributes:
        ladder: The items.
        one_shot: ΔNLL if only this item has this level, nats per token, (items, W).
        steps: The numbers of items and the positions of the levels that they get.
        rises: ΔNLL that each step adds, nats per token; at least 0.
    """

    ladder: Ladder
    one_shot: npt.NDArray[np.float64]
    steps: tuple[tuple[int, int], ...]
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


def greedy_order(costs: LevelCosts, item_bytes: LadderBytes) -> LadderOrder:
    """Start with native levels, and repeatedly take the step of the least cost per freed byte.

    The cost of a step is predicted: the sum of the costs of all levels after it minus that before
    it (`LevelCosts`), so nothing is measured again on the way. Bytes are those at one reference
    request, `REFERENCE_BATCH_SIZE` sequences of `REFERENCE_TOKENS` tokens. A step counts as the
    best of the levels to which it leads, so that a poor level on the way to a good one does not
    hold an item back. Steps that free nothing come last.
    """
    ladder, one_shot = item_bytes.ladder, one_shot_costs(costs, item_bytes.ladder)
    tokens = min(REFERENCE_TOKENS, item_bytes.memory.facts.max_positions)
    sizes, known = item_bytes.costs(REFERENCE_BATCH_SIZE, tokens).sizes, one_shot.tolist()
    positions = [0] * len(ladder)
    steps: list[tuple[int, int]] = []
    rises: list[float] = []

    def change(values: list[list[float]] | list[list[int]], item: int, lower: int) -> float:
        """What a lower level of an item adds to the sum of some values of all levels."""
        partner = ladder.partners[item]
        taken = lower == ladder.removals[item] and partner != item  # its cache goes too
        less = values[partner][positions[partner]] if taken else 0
        return values[item][lower] - values[item][positions[item]] - less

    def next_of(item: int) -> int:
        lower = positions[item] + 1
        return lower if lower < len(ladder.items[item].levels) else -1

    def price(item: int) -> float:
        takers, best = ladder.takers(item, next_of), float("inf")
        for lower in range(next_of(item), len(ladder.items[item].levels)):
            freed = -sum(change(sizes, one, lower) for one in takers)
            rise = sum(max(0.0, change(known, one, lower)) for one in takers)
            best = min(best, rise / freed if freed > 0 else float("inf"))
        return best

    prices = {item: price(item) for item in range(len(ladder))}
    while prices:
        cheapest = min(prices, key=lambda one: (prices[one], one))
        takers = ladder.takers(cheapest, next_of)
        for item in takers:
            rises.append(max(0.0, change(known, item, positions[item] + 1)))
            positions[item] += 1
            steps.append((item, positions[item]))
            cache = ladder.partners[item]
            if positions[item] == ladder.removals[item] and cache != item:
                positions[cache] = len(ladder.items[cache].levels)
        for item in {*takers, *(ladder.partners[one] for one in takers)}:
            prices.pop(item, None)
            if next_of(item) >= 0:
                prices[item] = price(item)
    return LadderOrder(ladder, one_shot, tuple(steps), tuple(rises))


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

"""Orders in which to lower the items of a ladder: predicted from one-shot costs, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.profiles import GSIProfile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.observation import ItemImportance

REFERENCE_BATCH_SIZE, REFERENCE_TOKENS = 4, 1024
"""The request at which an order weighs costs against bytes; fewer tokens for shorter models."""

Step = tuple[int, int]
"""The number of an item, and the position of the level that it gets."""

Floats = npt.NDArray[np.float64]


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
    """A plan on a ladder that is lowered step by step; no level is skipped.

    Attributes:
        ladder: The items.
        positions: The position of each item's level, (items,).
    """

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.positions = [0] * len(ladder)
        self._steps = ladder.every_step

    def next_of(self, item: int) -> int:
        """The position of an item's next level, -1 if there is none."""
        return self._steps.nexts[item][self.positions[item]]

    def lowerable(self) -> list[int]:
        """The items that can be lowered, only the first of those that are lowered together."""
        items = (item for item in range(len(self.ladder)) if self.next_of(item) >= 0)
        return [item for item in items if self.companions(item)[0] == item]

    def companions(self, item: int) -> list[int]:
        """The items that are lowered with one, itself included."""
        return self._steps.companions(self.positions, item)

    def after(self, item: int) -> list[int]:
        """The positions after an item was lowered with its companions."""
        positions = self.positions.copy()
        for moved, position in self._steps.moves(positions, item):
            positions[moved] = position
        return positions

    def changed_by(self, item: int) -> set[int]:
        """The items whose next step changes if an item is lowered."""
        moved = [n for n, _ in self._steps.moves(self.positions, item)]
        return {*moved, *(self.ladder.partners[n] for n in moved)}

    def lower(self, item: int) -> set[int]:
        """Lower an item with its companions, and return those of `changed_by`."""
        changed = self.changed_by(item)
        self.positions = self.after(item)
        return changed


class WeighedWalk(LadderWalk):
    """A walk with predicted costs and exact bytes.

    Costs are sums of one-shot costs (`LevelCosts`); bytes are those at one reference request,
    `REFERENCE_BATCH_SIZE` sequences of `REFERENCE_TOKENS` tokens.

    Attributes:
        one_shot: As in `LadderOrder`.
    """

    def __init__(self, costs: LevelCosts, item_bytes: LadderBytes) -> None:
        super().__init__(item_bytes.ladder)
        self.one_shot = one_shot_costs(costs, self.ladder)
        tokens = min(REFERENCE_TOKENS, item_bytes.memory.facts.max_positions)
        self._sizes = item_bytes.costs(REFERENCE_BATCH_SIZE, tokens).sizes
        self._costs: list[list[float]] = self.one_shot.tolist()

    def freed_bytes(self, item: int, lower: int | None = None) -> int:
        """Bytes that are freed if an item, with its companions, goes to a level (the next one)."""
        lower = self.next_of(item) if lower is None else lower
        return -int(sum(self._change(self._sizes, n, lower) for n in self.companions(item)))

    def rise(self, item: int, lower: int | None = None) -> float:
        """Predicted ΔNLL, at least 0, if an item, with its companions, goes to a level."""
        lower = self.next_of(item) if lower is None else lower
        return sum(max(0.0, self._change(self._costs, n, lower)) for n in self.companions(item))

    def price(self, item: int) -> float:
        """Cost per freed byte of the best level that lies below an item's level."""
        best = float("inf")
        for lower in range(self.next_of(item), len(self.ladder.items[item].levels)):
            freed = self.freed_bytes(item, lower)
            best = min(best, self.rise(item, lower) / freed) if freed > 0 else best
        return best

    def steps(self, item: int) -> list[tuple[Step, float]]:
        """The steps of lowering an item with its companions, with their predicted ΔNLL."""
        return [
            ((n, self.next_of(n)), max(0.0, self._change(self._costs, n, self.next_of(n))))
            for n in self.companions(item)
        ]

    def _change(self, values: list[list[float]] | list[list[int]], item: int, lower: int) -> float:
        """What a lower level of an item adds to the sum of some values of all levels."""
        cache = self.ladder.partners[item]
        removed = lower == self.ladder.removals[item] and cache != item  # its cache goes too
        less = values[cache][self.positions[cache]] if removed else 0
        return values[item][lower] - values[item][self.positions[item]] - less


Choose = Callable[[set[int]], int | None]
"""Names the item to lower next, given those whose next step changed; None ends the order."""


def follow(walk: LadderWalk, choose: Choose) -> Iterator[int]:
    """Lower the item that `choose` names, again and again, and yield it before it is lowered."""
    changed = set(range(len(walk.ladder)))
    while (item := choose(changed)) is not None:
        yield item
        changed = walk.lower(item)


def greedy_order(
    costs: LevelCosts, item_bytes: LadderBytes, measured: GSIProfile | None = None
) -> LadderOrder:
    """Start with native levels, and repeatedly take the step of the least cost per freed byte.

    Costs are predicted (see `WeighedWalk`), so nothing is measured on the way. A step counts as the
    best of the levels to which it leads, so that a poor level on the way to a good one does not
    hold an item back. Steps that free nothing come last.

    Args:
        costs: One-shot costs of the levels.
        item_bytes: The ladder and its bytes.
        measured: A GSI order with which the order begins. The ΔNLL of steps that are taken together
            is divided in proportion to their predicted ones.

    Raises:
        ArtifactError: The GSI order is of another ladder.
    """
    walk, ordered = WeighedWalk(costs, item_bytes), list[tuple[Step, float]]()
    if measured is not None:
        ordered += _measured_steps(walk, measured)
    prices: dict[int, float] = {}

    def cheapest(changed: Iterable[int]) -> int | None:
        for item in changed:
            prices.pop(item, None)
            if walk.next_of(item) >= 0:
                prices[item] = walk.price(item)
        return min(prices, key=lambda item: (prices[item], item), default=None)

    for item in follow(walk, cheapest):
        ordered += walk.steps(item)
    steps, rises = zip(*ordered, strict=True)
    return LadderOrder(walk.ladder, walk.one_shot, steps, tuple(max(0.0, rise) for rise in rises))


def _measured_steps(walk: WeighedWalk, profile: GSIProfile) -> list[tuple[Step, float]]:
    """The steps of a GSI order with their measured ΔNLL; takes them."""
    check_ladder(profile, walk.ladder)
    ordered, before = list[tuple[Step, float]](), profile.dense_nll
    for name, nll in zip(profile.order, profile.nll_after, strict=True):
        item = walk.ladder.numbers[name]
        steps = walk.steps(item)
        predicted = sum(rise for _, rise in steps)
        for step, rise in steps:
            share = rise / predicted if predicted > 0 else 1 / len(steps)
            ordered.append((step, (nll - before) * share))
        walk.lower(item)
        before = nll
    return ordered


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

    A level that was not measured, because it changes nothing on the text, costs as much as the one
    above it.
    """
    table = np.zeros((len(ladder), ladder.width))
    for number, item in enumerate(ladder.items):
        measured = costs.one_shot.get(item.name, {})
        for position, level in enumerate(item.levels[1:], start=1):
            table[number, position] = (
                costs.cost(item.name, level) if level in measured else table[number, position - 1]
            )
    return table

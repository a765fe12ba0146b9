"""Lowering the items of a ladder by one level, and raising them again. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import Counts, Ladder, Moves


@dataclass(frozen=True, eq=False)
class LevelSteps:
    """The level to which lowering takes each item from each of its levels.

    Requests of most lengths skip the same levels, so that they share these steps.

    Attributes:
        ladder: The items.
        next_level: Position of the next level, -1 if there is none, (items, W), read-only.
            Levels of a cache that need no fewer bytes than the level above them are skipped,
            such as a window that is longer than the sequence.
    """

    ladder: Ladder
    next_level: Counts

    def __post_init__(self) -> None:
        self.next_level.flags.writeable = False

    @classmethod
    def every(cls, ladder: Ladder) -> LevelSteps:
        """Steps that skip no level."""
        next_level = np.full((len(ladder), ladder.width), -1, dtype=np.int64)
        for number, item in enumerate(ladder.items):
            next_level[number, : len(item.levels) - 1] = range(1, len(item.levels))
        return cls(ladder, next_level)

    @cached_property
    def nexts(self) -> list[list[int]]:
        """`next_level` as Python integers, which are faster one at a time."""
        nexts: list[list[int]] = self.next_level.tolist()
        return nexts

    @cached_property
    def lower_levels(self) -> Counts:
        """The next level if the levels of all items are in one row, else the level, (items, W)."""
        positions = np.arange(self.ladder.width)
        lower = np.where(self.next_level >= 0, self.next_level, positions)
        return lower + self.ladder.first_levels[:, None]

    @cached_property
    def own_moves(self) -> list[list[Moves]]:
        """`own_moves_to` the next level of each item and level, (items, W)."""
        return [
            [self.own_moves_to(item, position) for position in nexts]
            for item, nexts in enumerate(self.nexts)
        ]

    def own_moves_to(self, item: int, position: int) -> Moves:
        """What moving one item to a lower level changes: the item, and the cache of a removed one.

        Caches that take a level together move one by one here.
        """
        ladder = self.ladder
        cache = ladder.counterparts[item]
        if cache == item or position != ladder.removals[item]:
            return ((item, position),)
        return (item, position), (cache, ladder.removed_cache)

    @cached_property
    def removes_cache(self) -> npt.NDArray[np.bool_]:
        """Whether the next level removes a block with its cache, (items, W)."""
        return np.array([[len(moves) > 1 for moves in levels] for levels in self.own_moves])

    @cached_property
    def is_shared(self) -> npt.NDArray[np.bool_]:
        """Whether the next level is one that all caches take together, (items, W)."""
        shared = np.isin(self.next_level, list(self.ladder.shared_positions))
        return np.asarray(shared & self.ladder.is_cache[:, None])

    @cached_property
    def _shared(self) -> list[list[bool]]:
        shared: list[list[bool]] = self.is_shared.tolist()
        return shared

    @cached_property
    def lowest(self) -> list[int]:
        """The position of each item's level once no action is valid, (items,)."""
        positions = [0] * len(self.ladder)
        for item, nexts in enumerate(self.nexts):
            while nexts[positions[item]] >= 0:
                positions = self.after(positions, item)
        return positions

    def moves(self, positions: Sequence[int], item: int) -> Moves:
        """What lowering an item that has a lower level changes, that item and its companions.

        Caches take some levels together, and a removed attention block takes its cache with
        it.

        Args:
            positions: The position of each item's level, (items,).
            item: Number of the item.

        Returns:
            Each item that moves, and the position of its new level.
        """
        position, nexts = positions[item], self.nexts
        if not self._shared[item][position]:
            return self.own_moves[item][position]
        lower = nexts[item][position]
        return tuple((n, lower) for n in self.ladder.caches if nexts[n][positions[n]] == lower)

    def after(self, positions: Sequence[int], item: int) -> list[int]:
        """The positions after lowering an item that has a lower level, (items,)."""
        return moved(positions, self.moves(positions, item))

    @cached_property
    def levels_above(self) -> list[list[int]]:
        """The position from which lowering leads to each level, -1 if no lowering does."""
        above = [[-1] * self.ladder.width for _ in self.nexts]
        for item, nexts in enumerate(self.nexts):
            position = 0
            while nexts[position] >= 0:
                above[item][nexts[position]] = position
                position = nexts[position]
        return above

    def raised(
        self, positions: Sequence[int], item: int, cache_position: int | None = None
    ) -> list[int] | None:
        """The positions after raising an item by one level: `after` inverted.

        Caches that take a level together leave it together, as long as none of them is lower.

        Args:
            positions: The position of each item's level, (items,).
            item: Number of the item.
            cache_position: Position of the level at which the cache of a removed attention
                block returns; None is the highest level of the kept caches.

        Returns:
            The positions, (items,); None if the item is native, a cache whose block is
            removed, or at a level that it cannot leave alone or that the request skips.
        """
        ladder, position = self.ladder, positions[item]
        above = self.levels_above[item][position] if position else -1
        if above < 0:
            return None
        higher = list(positions)
        higher[item] = above
        kept_caches = [cache for cache in ladder.caches if positions[cache] < ladder.removed_cache]
        if item in kept_caches and position in ladder.shared_positions:
            if any(positions[cache] != position for cache in kept_caches):
                return None
            for cache in kept_caches:
                higher[cache] = above
        for cache, _ in self.own_moves_to(item, position)[1:]:
            if cache_position is None:
                cache_position = min((positions[kept] for kept in kept_caches), default=0)
            higher[cache] = cache_position
        return higher

    def companions(self, positions: Sequence[int], item: int) -> list[int]:
        """The items that take the same level with one action, in order, the item included."""
        if self.ladder.items[item].kind != "cache":
            return [item]
        return [cache for cache, _ in self.moves(positions, item)]


def moved(positions: Sequence[int], moves: Moves) -> list[int]:
    """The positions after some items moved, (items,)."""
    after = list(positions)
    for item, position in moves:
        after[item] = position
    return after

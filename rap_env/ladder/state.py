"""Levels of a ladder's items while they are lowered, and the exact peak bytes. Without torch.

A plan's peak bytes are a constant, plus the bytes of each item at its level, plus what items
share. Three parts are shared: the workspace is smaller once no FFN block is left, larger while a
lowered cache is left, and, unless the model's own weights are packed, larger while lowered weights
are left. `rap_env.memory` defines the arithmetic. None of it depends on the budget.

`LadderState` follows one plan step by step; `StackedCosts` answers for many plans at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import Counts, Item, Ladder, LevelSteps
from rap_env.plan import Plan

KEPT_FFN, LOWERED_CACHE, LOWERED_WEIGHTS = 1, 2, 4
"""Flags of an item's level: what of it determines the bytes that items share."""


def flags_of(item: Item, level: str) -> int:
    """The flags of an item's level."""
    if item.kind == "cache":
        return 0 if level == "native" else LOWERED_CACHE
    kept_ffn = KEPT_FFN if item.kind == "ffn" and level != "removed" else 0
    return kept_ffn | (0 if level in ("native", "removed") else LOWERED_WEIGHTS)


class SharedBytes(NamedTuple):
    """Bytes that items share: numbers, or arrays with an entry for each plan.

    Attributes:
        last_ffn: Bytes by which the workspace shrinks when the last FFN block is removed.
        lowered_cache: Bytes that attention needs while at least one lowered cache is left.
        lowered_weights: Bytes that at least one lowered block, or lowered embeddings, needs.
    """

    last_ffn: Any
    lowered_cache: Any
    lowered_weights: Any

    def of(self, flags: Any) -> Any:
        """The shared bytes if some item has each of the flags."""
        return (
            self.lowered_cache * (flags & LOWERED_CACHE != 0)
            + self.lowered_weights * (flags & LOWERED_WEIGHTS != 0)
            - self.last_ffn * (flags & KEPT_FFN == 0)
        )


@dataclass(frozen=True, eq=False)
class LadderCosts:
    """Bytes of the items' levels for one batch size and sequence length on one model.

    Arrays have a row for each item and a column for each level, as many as the longest row needs
    (W); read-only.

    Attributes:
        ladder: The items.
        dense_peak_bytes: Peak bytes of the native model.
        kv_cache_bytes: Bytes of its KV cache.
        constant_bytes: Bytes that do not depend on any level.
        shared: Bytes that depend on several levels.
        item_bytes: Bytes of each item at each level; those of a cache, if its level is fixed,
            count for its attention block, (items, W).
        flags: The flags of each level, see `flags_of`, (items, W), uint8.
        flag_lists: The same as Python integers, which are faster one at a time.
        steps: The level to which lowering takes each item.
    """

    ladder: Ladder
    dense_peak_bytes: int
    kv_cache_bytes: int
    constant_bytes: int
    shared: SharedBytes
    item_bytes: Counts
    flags: npt.NDArray[np.uint8]
    flag_lists: list[list[int]]
    steps: LevelSteps

    @cached_property
    def sizes(self) -> list[list[int]]:
        """`item_bytes` as Python integers."""
        sizes: list[list[int]] = self.item_bytes.tolist()
        return sizes

    @cached_property
    def stacked(self) -> StackedCosts:
        """The same for many plans at once."""
        return StackedCosts([self])

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no action is valid.

        Every sequence of valid actions ends there. Some plan on the way may need slightly less,
        because of what items share.
        """
        return self.state(self.steps.lowest).peak_bytes

    @property
    def one_by_one(self) -> LadderCosts:
        """The same for a ladder whose caches take no levels together."""
        ladder = Ladder(self.ladder.items)
        return replace(self, ladder=ladder, steps=LevelSteps(ladder, self.steps.next_level))

    def peaks(self, positions: Counts) -> Counts:
        """Peak bytes of many plans, (n,), from the positions of their levels, (n, items)."""
        return self.stacked.peaks(positions)

    def freed_bytes(self, positions: Sequence[int] | Counts) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out, (items,)."""
        freed: Counts = self.stacked.freed_bytes(np.asarray(positions)[None])[0]
        return freed

    def state(self, positions: Sequence[int] | None = None) -> LadderState:
        """A state that starts with levels at some positions, by default native ones."""
        return LadderState(self, positions)

    def lower_until_fits(self, steps: Sequence[tuple[int, int]], budget_bytes: int) -> Plan:
        """Follow an order of steps until the request fits.

        A step is an item and the position of the level that it shall have; steps to levels that
        the request skips, or that are not below the item's level, are left out. Where the steps
        end, the plan has the levels that they reached.
        """
        state, nexts = self.state(), self.steps.nexts
        for item, position in steps:
            if state.peak_bytes <= budget_bytes:
                break
            if nexts[item][state.positions[item]] == position:
                state.lower(item)
        return state.plan


class Lowering(NamedTuple):
    """The effect of lowering an item with its companions, see `LadderState.lowering`.

    Attributes:
        moves: Each item that moves, and the position of its new level.
        held_bytes: Bytes afterwards, shared ones left out.
        counts: Numbers of kept FFN blocks, lowered caches and lowered weights afterwards.
        peak_bytes: Peak bytes afterwards.
    """

    moves: list[tuple[int, int]]
    held_bytes: int
    counts: tuple[int, int, int]
    peak_bytes: int


class LadderState:
    """A plan under one request: levels that are lowered one by one, and the exact peak bytes.

    ``state = ladder_bytes.costs(batch_size, seq_len_tokens).state()`` is the native model;
    ``state.lower(item)`` lowers an item with its companions. `lowering` tells the effect without
    doing it.

    Attributes:
        costs: The bytes of the request.
        positions: The position of each item's level, (items,); see `Ladder.positions`.
        peak_bytes: Peak bytes now.
    """

    __slots__ = ("_counts", "_held_bytes", "costs", "peak_bytes", "positions")

    def __init__(self, costs: LadderCosts, positions: Sequence[int] | None = None) -> None:
        self.costs = costs
        self.positions = [0] * len(costs.ladder) if positions is None else list(positions)
        items = np.arange(len(self.positions))
        flags = costs.flags[items, self.positions]
        self._held_bytes = costs.constant_bytes + int(costs.item_bytes[items, self.positions].sum())
        self._counts = (
            int(np.count_nonzero(flags & KEPT_FFN)),
            int(np.count_nonzero(flags & LOWERED_CACHE)),
            int(np.count_nonzero(flags & LOWERED_WEIGHTS)),
        )
        self.peak_bytes = self._held_bytes + _shared_bytes(costs.shared, self._counts)

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self.costs.ladder.plan(self.positions)

    def is_valid(self, item: int) -> bool:
        """Whether an item has a lower level."""
        return self.costs.steps.nexts[item][self.positions[item]] >= 0

    def companions(self, item: int) -> list[int]:
        """The items that take the same level with one action, in order, the item included."""
        return self.costs.steps.companions(self.positions, item)

    def freed_bytes(self, item: int) -> int:
        """Bytes that the item's next level frees, shared ones left out; 0 if there is none.

        The cache of a removed attention block counts, other companions do not.
        """
        position = self.positions[item]
        lower = self.costs.steps.nexts[item][position]
        if lower < 0:
            return 0
        sizes, ladder = self.costs.sizes, self.costs.ladder
        freed = sizes[item][position] - sizes[item][lower]
        if lower == ladder.removals[item] and (cache := ladder.partners[item]) != item:
            freed += sizes[cache][self.positions[cache]]
        return freed

    def lowering(self, item: int) -> Lowering:
        """The effect of lowering an item that has a lower level; `apply` makes it happen."""
        costs, positions = self.costs, self.positions
        sizes, flags = costs.sizes, costs.flag_lists
        moves = costs.steps.moves(positions, item)
        held_bytes, counts = self._held_bytes, self._counts
        for moved, lower in moves:
            position = positions[moved]
            held_bytes += sizes[moved][lower] - sizes[moved][position]
            if (before := flags[moved][position]) != (after := flags[moved][lower]):
                counts = (
                    counts[0] + bool(after & KEPT_FFN) - bool(before & KEPT_FFN),
                    counts[1] + bool(after & LOWERED_CACHE) - bool(before & LOWERED_CACHE),
                    counts[2] + bool(after & LOWERED_WEIGHTS) - bool(before & LOWERED_WEIGHTS),
                )
        return Lowering(moves, held_bytes, counts, held_bytes + _shared_bytes(costs.shared, counts))

    def positions_after(self, item: int) -> list[int]:
        """The positions of the levels after an item that has a lower level was lowered."""
        positions = self.positions.copy()
        for moved, position in self.costs.steps.moves(positions, item):
            positions[moved] = position
        return positions

    def apply(self, lowering: Lowering) -> None:
        """Make what `lowering` returned for the current levels happen."""
        moves, self._held_bytes, self._counts, self.peak_bytes = lowering
        for moved, position in moves:
            self.positions[moved] = position

    def changes(self, lowering: Lowering) -> set[int]:
        """The items whose level, or whose freed bytes, a lowering changes."""
        partners = self.costs.ladder.partners
        moved = [item for item, _ in lowering.moves]
        return {*moved, *[partners[item] for item in moved]}

    def lower(self, item: int) -> set[int]:
        """Lower an item that has a lower level, with its companions.

        Returns:
            The items whose level, or whose freed bytes, changed.
        """
        lowering = self.lowering(item)
        self.apply(lowering)
        return self.changes(lowering)


def _shared_bytes(shared: SharedBytes, counts: tuple[int, int, int]) -> int:
    kept_ffn, lowered_caches, lowered_weights = counts
    flags = KEPT_FFN if kept_ffn else 0
    flags |= LOWERED_CACHE if lowered_caches else 0
    flags |= LOWERED_WEIGHTS if lowered_weights else 0
    return int(shared.of(flags))


class StackedCosts:
    """Bytes and next levels of many plans at once, each under one of s shapes of requests.

    The methods take the positions of the levels of n plans, (n, items), and the number of each
    plan's shape, (n,), or one number for all.

    Args:
        costs: The bytes of each shape.

    Attributes:
        ladder: The items.
        dense_peak_bytes: Peak bytes of the native model under each shape, (s,).
    """

    def __init__(self, costs: Sequence[LadderCosts]) -> None:
        self.ladder = ladder = costs[0].ladder
        self.dense_peak_bytes = np.array([entry.dense_peak_bytes for entry in costs])
        self._constant_bytes = np.array([entry.constant_bytes for entry in costs])
        self._shared = [np.array(values) for values in zip(*(c.shared for c in costs), strict=True)]
        self._item_bytes = np.stack([entry.item_bytes for entry in costs])
        self._next_level = np.stack([entry.steps.next_level for entry in costs])
        self._flags = costs[0].flags
        # Where the levels of an item begin if those of all items, and shapes, are in one row.
        self._first = np.arange(len(ladder)) * ladder.width
        self._removals = np.array(ladder.removals)[ladder.cache_owners]

    def nexts(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """The position of each item's next level, -1 if there is none, (n, items)."""
        return self._next_level.take(self._levels(positions, shape))

    def peaks(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Peak bytes, (n,)."""
        held = self._item_bytes.take(self._levels(positions, shape)).sum(axis=1)
        flags = np.bitwise_or.reduce(self._flags.take(positions + self._first), axis=1)
        shared = SharedBytes(*(values[shape] for values in self._shared))
        return np.asarray(held + self._constant_bytes[shape] + shared.of(flags))

    def freed_bytes(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out, (n, items)."""
        levels, lower = self._levels(positions, shape), self.nexts(positions, shape)
        own = self._item_bytes.take(levels)
        freed = (own - self._item_bytes.take(levels + lower - positions)) * (lower >= 0)
        owners, caches = self.ladder.cache_owners, self.ladder.owned_caches
        freed[:, owners] += own[:, caches] * (lower[:, owners] == self._removals)
        return freed

    def lowered(self, positions: Counts, items: Counts, shape: Counts | int = 0) -> Counts:
        """The positions after an item of each plan, (n,), was lowered, see `Ladder.lowered`."""
        return self.ladder.lowered(positions, items, self.nexts(positions, shape))

    def _levels(self, positions: Counts, shape: Counts | int) -> Counts:
        offset = np.asarray(shape)[..., None] * self._item_bytes[0].size
        return np.asarray(positions + self._first + offset)

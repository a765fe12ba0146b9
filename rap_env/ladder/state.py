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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import Counts, Ladder, LevelSteps, Moves
from rap_env.ladder.shared_bytes import (
    KEPT_FFN,
    LOWERED_CACHE,
    LOWERED_WEIGHTS,
    SharedBytes,
)
from rap_env.plan import Plan


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
        return StackedCosts.of([self])

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no action is valid.

        Every sequence of valid actions ends there. Some plan on the way may need slightly less,
        because of what items share.
        """
        levels = self.steps.lowest_levels
        flags = int(np.bitwise_or.reduce(self.flags.take(levels)))
        held_bytes = self.constant_bytes + int(self.item_bytes.take(levels).sum())
        return held_bytes + int(self.shared.of(flags))

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
        ladder, where = self.ladder, np.asarray(positions)
        tables = self.item_bytes, self.steps.next_level
        return _freed(ladder, tables, ladder.item_array, where, where[ladder.partner_array], 0)

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
        flags_in: The flags that some item has afterwards.
    """

    moves: Moves
    held_bytes: int
    counts: tuple[int, int, int]
    peak_bytes: int
    flags_in: int


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

    __slots__ = (
        "_counts", "_flags", "_flags_in", "_held_bytes", "_nexts", "_own_moves", "_sizes",
        "costs", "peak_bytes", "positions",
    )  # fmt: skip

    def __init__(self, costs: LadderCosts, positions: Sequence[int] | None = None) -> None:
        self.costs = costs
        self._sizes, self._flags = costs.sizes, costs.flag_lists
        self._nexts, self._own_moves = costs.steps.nexts, costs.steps.own_moves
        self.positions = [0] * len(costs.ladder) if positions is None else list(positions)
        if positions is None:
            self._counts = costs.ladder.num_ffn, 0, 0
            self._flags_in = _flags_in(self._counts)
            self.peak_bytes = costs.dense_peak_bytes
            self._held_bytes = self.peak_bytes - costs.shared.of(self._flags_in)
            return
        items = costs.ladder.item_array
        flags = costs.flags[items, self.positions]
        self._held_bytes = costs.constant_bytes + int(costs.item_bytes[items, self.positions].sum())
        self._counts = (
            int(np.count_nonzero(flags & KEPT_FFN)),
            int(np.count_nonzero(flags & LOWERED_CACHE)),
            int(np.count_nonzero(flags & LOWERED_WEIGHTS)),
        )
        self._flags_in = _flags_in(self._counts)
        self.peak_bytes = self._held_bytes + costs.shared.of(self._flags_in)

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self.costs.ladder.plan(self.positions)

    def is_valid(self, item: int) -> bool:
        """Whether an item has a lower level."""
        return self._nexts[item][self.positions[item]] >= 0

    def companions(self, item: int) -> list[int]:
        """The items that take the same level with one action, in order, the item included."""
        return self.costs.steps.companions(self.positions, item)

    def freed_bytes(self, item: int) -> int:
        """Bytes that the item's next level frees, shared ones left out; 0 if there is none.

        The cache of a removed attention block counts, other companions do not.
        """
        position = self.positions[item]
        lower = self._nexts[item][position]
        if lower < 0:
            return 0
        freed, ladder = self._sizes[item][position] - self._sizes[item][lower], self.costs.ladder
        if lower == ladder.removals[item] and (cache := ladder.partners[item]) != item:
            freed += self._sizes[cache][self.positions[cache]]
        return freed

    def lowering(self, item: int) -> Lowering:
        """The effect of lowering an item that has a lower level; `apply` makes it happen."""
        positions, held_bytes = self.positions, self._held_bytes
        moves = self._own_moves[item][positions[item]] or self.costs.steps.moves(positions, item)
        kept_ffn, caches, weights = self._counts
        for moved, lower in moves:
            position, sizes, flags = positions[moved], self._sizes[moved], self._flags[moved]
            held_bytes += sizes[lower] - sizes[position]
            if (before := flags[position]) != (after := flags[lower]):
                kept_ffn += (after & KEPT_FFN) - (before & KEPT_FFN)
                caches += (after & LOWERED_CACHE) // LOWERED_CACHE
                caches -= (before & LOWERED_CACHE) // LOWERED_CACHE
                weights += (after & LOWERED_WEIGHTS) // LOWERED_WEIGHTS
                weights -= (before & LOWERED_WEIGHTS) // LOWERED_WEIGHTS
        counts = kept_ffn, caches, weights
        shared_bytes = self.peak_bytes - self._held_bytes
        if (flags_in := _flags_in(counts)) != self._flags_in:
            shared_bytes = self.costs.shared.of(flags_in)
        return Lowering(moves, held_bytes, counts, held_bytes + shared_bytes, flags_in)

    def positions_after(self, item: int) -> list[int]:
        """The positions of the levels after an item that has a lower level was lowered."""
        return self.costs.steps.after(self.positions, item)

    def apply(self, lowering: Lowering) -> None:
        """Make what `lowering` returned for the current levels happen."""
        moves, self._held_bytes, self._counts, self.peak_bytes, self._flags_in = lowering
        for moved, position in moves:
            self.positions[moved] = position

    def changes(self, lowering: Lowering) -> set[int]:
        """The items whose level, or whose freed bytes, a lowering changes."""
        partners, moves = self.costs.ladder.partners, lowering.moves
        if len(moves) == 1 and partners[moves[0][0]] == moves[0][0]:
            return {moves[0][0]}
        changed = {item for item, _ in moves}
        changed.update([partners[item] for item, _ in moves])
        return changed

    def lower(self, item: int) -> set[int]:
        """Lower an item that has a lower level, with its companions.

        Returns:
            The items whose level, or whose freed bytes, changed.
        """
        lowering = self.lowering(item)
        self.apply(lowering)
        return self.changes(lowering)


def _flags_in(counts: tuple[int, int, int]) -> int:
    """The flags that some item has."""
    kept_ffn, lowered_caches, lowered_weights = counts
    return (
        (KEPT_FFN if kept_ffn else 0)
        | (LOWERED_CACHE if lowered_caches else 0)
        | (LOWERED_WEIGHTS if lowered_weights else 0)
    )


class StackedCosts:
    """Bytes and next levels of many plans at once, each under one of s shapes of requests.

    The methods take the positions of the levels of n plans, (n, items), and the number of each
    plan's shape, (n,), or one number for all.

    Args:
        ladder: The items.
        count: Number of shapes, s; `put` gives their bytes.

    Attributes:
        dense_peak_bytes: Peak bytes of the native model under each shape, (s,).
        kv_cache_bytes: Bytes of its KV cache, (s,).
        size: Items times W: the levels of one shape.
    """

    def __init__(self, ladder: Ladder, count: int) -> None:
        self.ladder = ladder
        self.dense_peak_bytes, self.kv_cache_bytes = np.zeros((2, count), dtype=np.int64)
        self._constant_bytes = np.zeros(count, dtype=np.int64)
        self._shared = np.zeros((len(SharedBytes._fields), count), dtype=np.int64)
        self.size = len(ladder) * ladder.width
        self._item_bytes, self._next_level = np.zeros((2, count, self.size), dtype=np.int64)
        self._flags = np.zeros(self.size, dtype=np.uint8)
        self._first = ladder.first_levels
        self._is_cache = np.isin(np.arange(len(ladder)), ladder.caches)
        self._is_shared = np.isin(np.arange(ladder.width), list(ladder.shared_positions))

    @classmethod
    def of(cls, costs: Sequence[LadderCosts]) -> StackedCosts:
        """The bytes of some shapes of requests on one model."""
        stacked = cls(costs[0].ladder, len(costs))
        stacked.put(np.arange(len(costs)), costs)
        return stacked

    def put(self, shapes: Counts, costs: Sequence[LadderCosts]) -> None:
        """Set the bytes of some shapes, given by number, (m,)."""
        self.dense_peak_bytes[shapes] = [entry.dense_peak_bytes for entry in costs]
        self.kv_cache_bytes[shapes] = [entry.kv_cache_bytes for entry in costs]
        self._constant_bytes[shapes] = [entry.constant_bytes for entry in costs]
        self._shared[:, shapes] = np.array([entry.shared for entry in costs]).T
        self._flags = costs[0].flags.reshape(-1)
        for shape, entry in zip(shapes.tolist(), costs, strict=True):
            self._item_bytes[shape] = entry.item_bytes.reshape(-1)
            self._next_level[shape] = entry.steps.next_level.reshape(-1)

    def nexts(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """The position of each item's next level, -1 if there is none, (n, items)."""
        return self._next_level.take(positions + self._first + self._offset(shape))

    def peaks(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Peak bytes, (n,)."""
        levels = positions + self._first
        flags = np.bitwise_or.reduce(self._flags.take(levels), axis=1)
        held = self._item_bytes.take(levels + self._offset(shape)).sum(axis=1)
        shared = SharedBytes(*self._shared[:, shape]).of(flags)
        return np.asarray(held + self._constant_bytes[shape] + shared)

    def freed_bytes(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out, (n, items)."""
        ladder = self.ladder
        partners = positions[:, ladder.partner_array]
        return self.freed_of(ladder.item_array, positions, partners, self._offset(shape))

    def freed_of(
        self, items: Counts, positions: Counts, partner_positions: Counts, offsets: Counts
    ) -> Counts:
        """As `freed_bytes` for some items of some plans, (k,).

        Args:
            items: The items.
            positions: The positions of their levels.
            partner_positions: Those of the items in `Ladder.partners`.
            offsets: Numbers of the shapes, times `size`.
        """
        tables = self._item_bytes, self._next_level
        return _freed(self.ladder, tables, items, positions, partner_positions, offsets)

    def next_of(self, items: Counts, positions: Counts, offsets: Counts) -> Counts:
        """As `nexts` for some items of some plans, see `freed_of`, (k,)."""
        return self._next_level.take(positions + self._first[items] + offsets)

    def lowered(self, positions: Counts, items: Counts, shape: Counts | int = 0) -> Counts:
        """The positions after an item of each plan, (n,), with its companions, was lowered.

        An item without a lower level changes nothing. `LevelSteps.moves` is the same for one plan.
        """
        plans, shape = np.arange(len(items)), np.zeros(len(items), dtype=np.int64) + shape
        before = positions[plans, items]
        lower = self._next_level.take(before + self._first[items] + shape * self.size)
        after, valid = positions.copy(), lower >= 0
        after[plans, items] = np.where(valid, lower, before)
        if not self.ladder.caches:
            return after
        with_cache = valid & (lower == self.ladder.cache_removals[items])
        caches = self.ladder.partner_array[items[with_cache]]
        after[plans[with_cache], caches] = 1 + len(self.ladder.cache_levels)
        shared = valid & self._is_cache[items] & self._is_shared[lower]
        if shared.any():
            level = lower[shared, None]
            same = self._is_cache & (self.nexts(positions[shared], shape[shared]) == level)
            after[shared] = np.where(same, level, after[shared])
        return after

    def _offset(self, shape: Counts | int) -> Counts:
        return np.asarray(shape)[..., None] * self.size


def _freed(
    ladder: Ladder,
    tables: tuple[Counts, Counts],
    items: Counts,
    positions: Counts,
    partner_positions: Counts,
    offsets: Counts | int,
) -> Counts:
    """`StackedCosts.freed_of`, from tables of the bytes and the next level of each level."""
    sizes, next_level = tables
    levels = positions + ladder.first_levels[items] + offsets
    lower = next_level.take(levels)
    freed = sizes.take(levels) - sizes.take(levels + lower - positions)
    if ladder.caches:
        partner_levels = partner_positions + ladder.first_levels[ladder.partner_array[items]]
        freed += sizes.take(partner_levels + offsets) * (lower == ladder.cache_removals[items])
    return np.asarray(freed * (lower >= 0))

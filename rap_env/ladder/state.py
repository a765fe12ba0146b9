"""Levels of a ladder's items while they are lowered, and the exact peak bytes. Without torch.

A plan's peak bytes are a constant, plus the bytes of each item at its level, plus what items
share. Three parts are shared: the workspace is smaller once no FFN block is left, larger
while a lowered cache is left, and, unless the model's own weights are packed, larger while
lowered weights are left. `rap_env.memory` defines the arithmetic. None of it depends on the
budget.

`StackedCosts` answers for many plans at once; `LadderState` follows one plan step by step,
with the same tables as Python lists, which are faster one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np

from rap_env.ladder.items import Counts, Ladder, Moves, Sharers
from rap_env.ladder.steps import LevelSteps
from rap_env.plan import Plan


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

    def of(self, sharers: Sharers) -> Any:
        """The shared bytes of plans."""
        return (
            self.lowered_cache * (sharers.lowered_caches > 0)
            + self.lowered_weights * (sharers.lowered_weights > 0)
            - self.last_ffn * (sharers.kept_ffn == 0)
        )


@dataclass(frozen=True, eq=False)
class LadderCosts:
    """Bytes of the items' levels for one batch size and sequence length on one model.

    Arrays have a row for each item and a column for each level, as many as the longest row
    needs (W); read-only.

    Attributes:
        ladder: The items.
        dense_peak_bytes: Peak bytes of the native model.
        kv_cache_bytes: Bytes of its KV cache.
        constant_bytes: Bytes that do not depend on any level.
        shared: Bytes that depend on several levels.
        item_bytes: Bytes of each item at each level; those of a cache, if its level is fixed,
            count for its attention block, (items, W).
        steps: The level to which lowering takes each item.
    """

    ladder: Ladder
    dense_peak_bytes: int
    kv_cache_bytes: int
    constant_bytes: int
    shared: SharedBytes
    item_bytes: Counts
    steps: LevelSteps

    @cached_property
    def sizes(self) -> list[list[int]]:
        """`item_bytes` as Python integers."""
        sizes: list[list[int]] = self.item_bytes.tolist()
        return sizes

    @cached_property
    def freed(self) -> Counts:
        """Bytes that lowering each item from each level frees, (items, W); 0 at its lowest level.

        Neither shared bytes count, nor the cache that a block takes with it.
        """
        return self.item_bytes - self.item_bytes.take(self.steps.lower_levels)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What `StackedCosts` needs to know of the shape as a whole."""
        return self.dense_peak_bytes, self.kv_cache_bytes, self.constant_bytes, *self.shared

    @cached_property
    def tables(self) -> Counts:
        """What `StackedCosts` needs to know of each level, (5, items, W)."""
        return np.array([self.item_bytes, self.freed, *self.steps.tables])

    @cached_property
    def stacked(self) -> StackedCosts:
        """The same for many plans at once."""
        return StackedCosts(self.ladder, np.array(self.numbers)[:, None], self.tables[:, None])

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no action is valid.

        Every sequence of valid actions ends there. Some plan on the way may need slightly
        less, because of what items share.
        """
        # The sum of `StackedCosts.peaks`, without its tables: a reset needs it.
        steps = self.steps
        own_bytes = int(self.item_bytes.take(steps.lowest_levels).sum())
        return own_bytes + self.constant_bytes + int(self.shared.of(steps.lowest_sharers))

    @property
    def one_by_one(self) -> LadderCosts:
        """The same for a ladder whose caches take no levels together."""
        ladder = Ladder(self.ladder.items)
        return replace(self, ladder=ladder, steps=LevelSteps(ladder, self.steps.next_level))

    def peaks(self, positions: Counts) -> Counts:
        """Peak bytes of many plans, (n,), from the positions of their levels, (n, items)."""
        return self.stacked.peaks(positions)

    def state(self, positions: Sequence[int] | None = None) -> LadderState:
        """A state that starts with levels at some positions, by default native ones."""
        return LadderState(self, positions)

    def lower_until_fits(self, steps: Sequence[tuple[int, int]], budget_bytes: int) -> Plan:
        """Follow an order of steps until the request fits.

        A step is an item and the position of the level that it shall have; steps to levels
        that the request skips, or that are not below the item's level, are left out. Where
        the steps end, the plan has the levels that they reached.
        """
        state, nexts = self.state(), self.steps.nexts
        for item, position in steps:
            if state.peak_bytes <= budget_bytes:
                break
            if nexts[item][state.positions[item]] == position:
                state.lower(item)
        return state.plan


class Lowering(NamedTuple):
    """The effect of lowering an item with its companions, see `LadderState.preview`.

    Attributes:
        moves: Each item that moves, and the position of its new level.
        peak_bytes: Peak bytes afterwards.
        shared_bytes: Shared bytes afterwards.
        sharers: Afterwards.
    """

    moves: Moves
    peak_bytes: int
    shared_bytes: int
    sharers: Sharers


class LadderState:
    """A plan under one request: levels that are lowered one by one, and the exact peak bytes.

    ``state = ladder_bytes.costs(batch_size, seq_len_tokens).state()`` is the native model;
    ``state.lower(item)`` lowers an item with its companions. `preview` tells the effect
    without lowering anything.

    Attributes:
        costs: The bytes of the request.
        positions: The position of each item's level, (items,); see `Ladder.positions`.
        peak_bytes: Peak bytes now.
    """

    __slots__ = (
        "_item_sharers", "_shared_bytes", "_sharers", "_sizes", "_steps", "costs", "peak_bytes",
        "positions",
    )  # fmt: skip

    def __init__(self, costs: LadderCosts, positions: Sequence[int] | None = None) -> None:
        self.costs, ladder = costs, costs.ladder
        self._sizes, self._steps, self._item_sharers = costs.sizes, costs.steps, ladder.sharers
        if positions is None:
            self.positions, self._sharers = [0] * len(ladder), ladder.native_sharers
            self.peak_bytes = costs.dense_peak_bytes
        else:
            self.positions, self._sharers = list(positions), ladder.count_sharers(positions)
            self.peak_bytes = int(costs.peaks(np.array(positions)))
        self._shared_bytes: int = costs.shared.of(self._sharers)

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self.costs.ladder.plan(self.positions)

    def is_valid(self, item: int) -> bool:
        """Whether an item has a lower level."""
        return self._steps.nexts[item][self.positions[item]] >= 0

    def companions(self, item: int) -> list[int]:
        """The items that take the same level with one action, in order, the item included."""
        return self._steps.companions(self.positions, item)

    def freed_bytes(self, item: int) -> int:
        """Bytes that the item's next level frees, shared ones left out; 0 if there is none.

        The cache of a removed attention block counts, other companions do not.
        """
        if not self.is_valid(item):
            return 0
        freed_bytes, sizes, positions = 0, self._sizes, self.positions
        for moved, lower in self._steps.own_moves[item][positions[item]]:
            freed_bytes += sizes[moved][positions[moved]] - sizes[moved][lower]
        return freed_bytes

    def preview(self, item: int) -> Lowering:
        """The effect of lowering an item that has a lower level; `apply` makes it happen."""
        positions, shared_bytes = self.positions, self._shared_bytes
        moves = self._steps.moves(positions, item)
        own_bytes = self.peak_bytes - shared_bytes
        sharers = self._sharers
        for moved, lower in moves:
            position, sizes, each = positions[moved], self._sizes[moved], self._item_sharers[moved]
            own_bytes += sizes[lower] - sizes[position]
            before, after = each[position], each[lower]
            if before != after:
                sharers = Sharers(
                    sharers.kept_ffn + after.kept_ffn - before.kept_ffn,
                    sharers.lowered_caches + after.lowered_caches - before.lowered_caches,
                    sharers.lowered_weights + after.lowered_weights - before.lowered_weights,
                )
        if sharers is not self._sharers:
            shared_bytes = self.costs.shared.of(sharers)
        return Lowering(moves, own_bytes + shared_bytes, shared_bytes, sharers)

    def positions_after(self, item: int) -> list[int]:
        """The positions of the levels after an item that has a lower level was lowered."""
        return self._steps.after(self.positions, item)

    def apply(self, lowering: Lowering) -> None:
        """Make what `preview` returned for the current levels happen."""
        self.peak_bytes, self._shared_bytes = lowering.peak_bytes, lowering.shared_bytes
        self._sharers = lowering.sharers
        for moved, position in lowering.moves:
            self.positions[moved] = position

    def changes(self, lowering: Lowering) -> frozenset[int]:
        """The items whose level, or whose freed bytes, a lowering changes."""
        pairs, moves = self.costs.ladder.pairs, lowering.moves
        if len(moves) == 1:
            return pairs[moves[0][0]]
        return frozenset().union(*(pairs[item] for item, _ in moves))

    def lower(self, item: int) -> frozenset[int]:
        """Lower an item that has a lower level, with its companions.

        Returns:
            The items whose level, or whose freed bytes, changed.
        """
        lowering = self.preview(item)
        self.apply(lowering)
        return self.changes(lowering)


class StackedCosts:
    """Bytes and next levels of many plans at once, each under one of s shapes of requests.

    The methods take the positions of the levels of n plans, (n, items), and the number of
    each plan's shape, (n,), or one number for all; for one plan also (items,). Two of them
    take what `levels` returns of both.

    Args:
        ladder: The items.
        numbers: `LadderCosts.numbers` of each shape, (6, s).
        tables: `LadderCosts.tables` of each shape, (5, s, items, W).

    Attributes:
        dense_peak_bytes: Peak bytes of the native model under each shape, (s,).
        kv_cache_bytes: Bytes of its KV cache, (s,).
    """

    def __init__(self, ladder: Ladder, numbers: Counts, tables: Counts) -> None:
        self.ladder, self._numbers, self._tables = ladder, numbers, tables
        self.dense_peak_bytes, self.kv_cache_bytes, self._constant_bytes, *_ = numbers
        self._item_bytes, self._freed, self._next_level, self._removes_cache, self._is_shared = (
            tables
        )
        first_shapes = np.arange(tables.shape[1])[:, None] * (len(ladder) * ladder.width)
        self._first_levels = first_shapes + ladder.first_levels

    @classmethod
    def of_shapes(cls, ladder: Ladder, count: int) -> Self:
        """Zeros for a number of shapes; `put` sets them."""
        numbers = np.zeros((3 + len(SharedBytes._fields), count), dtype=np.int64)
        return cls(ladder, numbers, np.zeros((5, count, len(ladder), ladder.width), dtype=np.int64))

    def put(self, shapes: Counts, costs: Sequence[LadderCosts]) -> None:
        """Set the bytes of some shapes, given by number, (m,)."""
        self._numbers[:, shapes] = np.array([entry.numbers for entry in costs]).T
        for shape, entry in zip(shapes.tolist(), costs, strict=True):
            self._tables[:, shape] = entry.tables

    def levels(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Where tables (s, items, W) have the items' levels, if they are one row, (n, items)."""
        return np.asarray(positions + self._first_levels[shape])

    def nexts(self, levels: Counts) -> Counts:
        """The position of each item's next level, -1 if there is none, (n, items)."""
        return np.asarray(self._next_level.take(levels))

    def peaks(self, positions: Counts, shape: Counts | int = 0) -> Counts:
        """Peak bytes, (n,)."""
        own_bytes = self._item_bytes.take(self.levels(positions, shape)).sum(axis=-1)
        shared = SharedBytes(*self._numbers[3:, shape]).of(self.ladder.any_sharers(positions))
        return np.asarray(own_bytes + self._constant_bytes[shape] + shared)

    def freed_bytes(self, levels: Counts) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out, (n, items).

        The cache of a removed attention block counts, other companions do not.
        """
        ladder = self.ladder
        freed: Counts = self._freed.take(levels)
        if ladder.caches:
            cache_bytes = self._item_bytes.take(levels[..., ladder.counterpart_array])
            freed += cache_bytes * self._removes_cache.take(levels)
        return freed

    def lowered(self, positions: Counts, items: Counts, shape: Counts | int = 0) -> Counts:
        """The positions after an item of each plan, (n,), with its companions, was lowered.

        An item without a lower level changes nothing. `LevelSteps.moves` is the same for one
        plan.
        """
        plans, ladder = np.arange(len(items)), self.ladder
        all_levels, after = self.levels(positions, shape), positions.copy()
        nexts, levels = self.nexts(all_levels), all_levels[plans, items]
        lower = nexts[plans, items]
        after[plans, items] = np.where(lower >= 0, lower, positions[plans, items])
        if not ladder.caches:
            return after
        removes = self._removes_cache.take(levels) > 0
        after[plans[removes], ladder.counterpart_array[items[removes]]] = ladder.removed_cache
        shared = self._is_shared.take(levels) > 0
        same = ladder.is_cache & (nexts[shared] == lower[shared, None])
        after[shared] = np.where(same, lower[shared, None], after[shared])
        return after

"""Levels of a ladder's items while they are lowered, and the exact peak bytes. Without torch.

A plan's peak bytes are a constant, plus the bytes of each item at its level, plus what items
share. Three parts are shared: the workspace is smaller once no FFN block is left, larger
while a lowered cache is left, and, unless the model's own weights are packed, larger while
lowered weights are left. `rap_env.memory` defines the arithmetic. None of it depends on the
budget.

`StackedCosts` answers for many plans at once, from tables that all requests share;
`LadderState` follows one plan step by step, with Python lists, which are faster one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import SHARER_UNITS, Counts, Ladder, Moves, Sharers
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
        native_peak_bytes: Peak bytes of the native model.
        kv_cache_bytes: Bytes of its KV cache.
        constant_bytes: Bytes that do not depend on any level.
        shared: Bytes that depend on several levels.
        item_bytes: Bytes of each item at each level; those of a cache, if its level is fixed,
            count for its attention block, (items, W).
        steps: The level to which lowering takes each item.
    """

    ladder: Ladder
    native_peak_bytes: int
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
    def stacked(self) -> StackedCosts:
        """The same for many plans at once."""
        tables = LevelTables(self.ladder, self.item_bytes)
        tables.add(self.steps)
        numbers = np.zeros((len(ShapeRow), 1), dtype=np.int64)
        numbers[ShapeRow.NATIVE_PEAK_BYTES] = self.native_peak_bytes
        numbers[ShapeRow.KV_CACHE_BYTES] = self.kv_cache_bytes
        numbers[ShapeRow.CONSTANT_BYTES] = self.constant_bytes
        numbers[SHARED_ROWS, 0] = self.shared
        return StackedCosts(tables, numbers)

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no action is valid.

        Every sequence of valid actions ends there. Some plan on the way may need slightly
        less, because of what items share.
        """
        return int(self.stacked.least_peak_bytes[0])

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
            self.peak_bytes = costs.native_peak_bytes
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


class LevelTables:
    """What the items of a ladder need at each of W levels, for requests of all shapes.

    The bytes of an item at a level are a constant, plus one of K numbers that depend on the
    request: the bytes of a cache. Tables have the levels of all items in one row, (items *
    W,); of what lowering does they have one such row after another for each of `steps`.

    Args:
        ladder: The items.
        item_bytes: The constants, (items, W).
        numbers: Which of the K numbers is added; 0, which is always 0, where none is,
            (items, W). None is 0 everywhere.
        count: K.

    Attributes:
        every_level: The place of each level in a table, (items, W).
        steps: The ways in which the lengths of requests skip levels.
        item_bytes: As the argument.
        numbers: As the argument.
        freed_bytes: The constant part of the bytes that lowering frees.
        freed_numbers: Which number is added to it: one of the K, or of as many that follow,
            which are what lowering frees of each.
        next_level: Position of the next level, -1 if there is none.
        effects: `NO_MOVE`, `OWN_MOVE`, `WITH_CACHE` or `TOGETHER`.
        next_numbers: The number that lowering puts in the place of each, (steps, K).
        lowest_bytes: The constant bytes of all items once no action is valid, (steps,).
        lowest_counts: How often each number is added there, (steps, K).
        lowest_codes: What the items count for there, see `Ladder.sharer_codes`, (steps,).
    """

    next_level: Counts
    effects: Counts
    next_numbers: Counts
    lowest_bytes: Counts
    lowest_counts: Counts
    lowest_codes: Counts

    def __init__(
        self, ladder: Ladder, item_bytes: Counts, numbers: Counts | None = None, count: int = 1
    ) -> None:
        self.ladder, self.count, self.steps = ladder, count, list[LevelSteps]()
        self.size = item_bytes.size
        self.every_level = np.arange(self.size).reshape(item_bytes.shape)
        self.item_bytes = item_bytes.ravel()
        self.numbers = np.zeros_like(self.item_bytes) if numbers is None else numbers.ravel()
        self.caches = np.array(ladder.caches, dtype=np.int64)

    def add(self, steps: LevelSteps) -> int:
        """Add a way of skipping levels; returns its place in `steps`."""
        ladder, lower = self.ladder, steps.lower_levels
        flat, numbers = lower.ravel(), self.numbers
        if not self.steps:  # lengths skip levels of caches only, which have no constant part
            self.freed_bytes = self.item_bytes - self.item_bytes.take(flat)
            changes = numbers * (numbers.take(flat) != numbers)
            of_caches = np.repeat(ladder.is_cache, ladder.width) & (numbers > 0)
            self.freed_numbers = np.where(of_caches, numbers + self.count, changes)
        next_numbers = np.arange(self.count)
        positions = self.caches[:, None] * ladder.width + np.arange(ladder.width)
        next_numbers[numbers.take(positions)] = numbers.take(flat.take(positions))
        next_numbers[0] = 0
        effects = np.where(steps.next_level >= 0, OWN_MOVE, NO_MOVE)
        effects[steps.removes_cache], effects[steps.is_shared] = WITH_CACHE, TOGETHER
        lowest = np.array(steps.lowest) + ladder.first_levels
        rows: dict[str, Any] = {
            "next_level": steps.next_level.ravel(),
            "effects": effects.ravel(),
            "next_numbers": next_numbers[None],
            "lowest_bytes": self.item_bytes.take(lowest).sum(keepdims=True),
            "lowest_counts": np.bincount(numbers.take(lowest), minlength=self.count)[None],
            "lowest_codes": ladder.sharer_codes.take(lowest).sum(keepdims=True),
        }
        for name, row in rows.items():
            setattr(self, name, np.concatenate([getattr(self, name), row]) if self.steps else row)
        self.steps.append(steps)
        return len(self.steps) - 1


class ShapeRow(IntEnum):
    """What the rows of `StackedCosts.numbers` are, each with a value for each shape."""

    BATCH_SIZE = 0
    SEQ_LEN_TOKENS = 1
    NATIVE_PEAK_BYTES = 2
    KV_CACHE_BYTES = 3
    CONSTANT_BYTES = 4
    LAST_FFN_BYTES = 5
    LOWERED_CACHE_BYTES = 6
    LOWERED_WEIGHTS_BYTES = 7
    STEPS = 8
    """The place of the shape's steps in those of the tables."""


SHARED_ROWS = slice(int(ShapeRow.LAST_FFN_BYTES), int(ShapeRow.LOWERED_WEIGHTS_BYTES) + 1)
"""The rows of `SharedBytes`, in the order of its fields."""

_UNITS = SHARER_UNITS.tolist()
_MOST_SHARERS = _UNITS[1] - 1

NO_MOVE, OWN_MOVE, WITH_CACHE, TOGETHER = range(4)
"""What lowering an item moves: nothing, the item, also its cache, all caches at its level."""


class StackedCosts:
    """Bytes and next levels of many plans at once, each under one of s shapes of requests.

    Most methods take items by number, the positions of their levels, and the number of each
    one's shape, arrays that are broadcast together. The positions of the counterparts are
    those of the caches of attention blocks and the reverse, see `Ladder.counterparts`.

    Args:
        tables: What all shapes share.
        numbers: The values of each shape, a row for each `ShapeRow`, (rows, s).
        varying: The K numbers of `LevelTables` and what lowering frees of each, (s, 2K); None
            is 0.

    Attributes:
        numbers: As the argument.
        batch_sizes: The batch size of each shape, (s,).
        seq_lens_tokens: The tokens of a sequence, (s,).
        native_peak_bytes: Peak bytes of the native model, (s,).
        kv_cache_bytes: Bytes of its KV cache, (s,).
        kinds: The place of the shape's steps in those of the tables, (s,).
    """

    batch_sizes: Counts
    seq_lens_tokens: Counts
    native_peak_bytes: Counts
    kv_cache_bytes: Counts
    kinds: Counts

    def __init__(self, tables: LevelTables, numbers: Counts, varying: Counts | None = None) -> None:
        shape = numbers.shape[1], 2 * tables.count
        self.tables, self.ladder, self.numbers = tables, tables.ladder, numbers
        self._varying = np.zeros(shape, dtype=np.int64) if varying is None else varying
        self._at = np.arange(shape[0]) * shape[1]
        self.batch_sizes = numbers[ShapeRow.BATCH_SIZE]
        self.seq_lens_tokens = numbers[ShapeRow.SEQ_LEN_TOKENS]
        self.native_peak_bytes = numbers[ShapeRow.NATIVE_PEAK_BYTES]
        self.kv_cache_bytes = numbers[ShapeRow.KV_CACHE_BYTES]
        self._constant_bytes = numbers[ShapeRow.CONSTANT_BYTES]
        self.kinds = numbers[ShapeRow.STEPS]
        self._first = tables.ladder.first_levels

    def put(self, shapes: Counts, costs: StackedCosts, others: Any = slice(None)) -> None:
        """Set the bytes of some shapes, given by number, (m,), to those of `others` of `costs`."""
        self.numbers[:, shapes] = costs.numbers[:, others]
        self._varying[shapes] = costs._varying[others]

    def of_shape(self, shape: int) -> StackedCosts:
        """Those of one shape, by its number."""
        only = slice(shape, shape + 1)
        return StackedCosts(self.tables, self.numbers[:, only], self._varying[only])

    @property
    def least_peak_bytes(self) -> Counts:
        """Peak bytes under each shape once no action is valid, (s,)."""
        tables, kinds, count = self.tables, self.kinds, self.tables.count
        of_caches = (self._varying[:, :count] * tables.lowest_counts[kinds]).sum(axis=1)
        own_bytes = tables.lowest_bytes[kinds] + of_caches + self._constant_bytes
        return self.with_shared(own_bytes, tables.lowest_codes[kinds], slice(None))

    def levels(self, items: Any, positions: npt.NDArray[Any]) -> Counts:
        """Where the tables have items' levels."""
        return np.asarray(self._first[items] + positions)

    def nexts(self, positions: Counts, shape: Any = 0) -> Counts:
        """The position of the next level of all items of plans, -1 if there is none, (n, items)."""
        places = self.in_steps(self._first + positions, column(shape))
        return np.asarray(self.tables.next_level.take(places))

    def in_steps(self, levels: Counts, shape: Any) -> Counts:
        """Where levels are in tables with a row for each of the tables' steps."""
        if len(self.tables.steps) > 1:
            levels = levels + self.kinds[shape] * self.tables.size
        return levels

    def item_bytes(self, levels: Counts, shape: Any) -> Counts:
        """Bytes of items at levels."""
        tables = self.tables
        varying = self._varying.take(self._at[shape] + tables.numbers.take(levels))
        return np.asarray(tables.item_bytes.take(levels) + varying)

    def peaks(self, positions: Counts, shape: Any = 0) -> Counts:
        """Peak bytes of plans, from the positions of all levels, (n, items) or (items,)."""
        return self.with_shared(*self.sums(positions, shape), shape)

    def sums(self, positions: Counts, shape: Any = 0) -> tuple[Counts, Counts]:
        """What plans need without shared bytes, and what they count for: for `with_shared`."""
        levels = self._first + positions
        own_bytes = self.item_bytes(levels, column(shape)).sum(axis=-1)
        own_bytes = own_bytes + self._constant_bytes[shape]
        return own_bytes, self.ladder.sharer_codes.take(levels).sum(axis=-1)

    def with_shared(self, own_bytes: Counts, codes: Counts, shape: Any) -> Counts:
        """Peak bytes of plans, with what their items share, from the codes of their sharers."""
        sharers = Sharers(*(codes & unit * _MOST_SHARERS for unit in _UNITS))
        return np.asarray(own_bytes + SharedBytes(*self.numbers[SHARED_ROWS, shape]).of(sharers))

    def freed_bytes(
        self, items: Any, levels: Counts, places: Counts, counterparts: Any, shape: Any = 0
    ) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out.

        The cache of a removed attention block counts, other companions do not.
        """
        tables, at = self.tables, self._at[shape]
        freed = self._varying.take(at + tables.freed_numbers.take(levels))
        freed += tables.freed_bytes.take(levels)
        if len(tables.caches):
            removes = tables.effects.take(places) == WITH_CACHE
            cache_levels = self.levels(self.ladder.counterpart_array[items], counterparts)
            freed += removes * self.item_bytes(cache_levels, shape)
        return np.asarray(freed)

    def freed_together(
        self, positions: npt.NDArray[Any], shape: Any = 0
    ) -> tuple[Counts, Counts, Counts]:
        """What lowering caches frees where several take a level together.

        Args:
            positions: The positions of the plans' levels, (n, items).
            shape: As for `moves`.

        Returns:
            The number of the plan, the cache, and the bytes that all of them free, (k,) each.
        """
        tables, caches = self.tables, self.tables.caches
        levels, shape = self.levels(caches, positions[:, caches]), column(shape)
        places = self.in_steps(levels, shape)
        together = tables.effects.take(places) == TOGETHER
        plans, columns = together.nonzero()
        of_each = shape[plans, 0] if isinstance(shape, np.ndarray) else shape
        items, at = caches[columns], places[together]
        lower = tables.next_level.take(at)
        freed = self.freed_bytes(items, levels[together], at, 0, of_each)
        groups = plans * self.ladder.width + lower
        return plans, items, np.bincount(groups, freed).astype(np.int64)[groups]

    def moves(
        self, positions: npt.NDArray[Any], items: Counts, shape: Any = 0
    ) -> tuple[Counts, Counts, Counts]:
        """What lowering an item of each plan, (n,), moves; `LevelSteps.moves` is the same for one.

        Args:
            positions: The positions of the plans' levels, (n, items).
            items: An item of each plan, (n,); one without a lower level moves nothing.
            shape: The shape of each, (n,), or one number for all.

        Returns:
            The number of the plan, the item and its new position, (moves,) each.
        """
        tables, ladder, plans = self.tables, self.ladder, np.arange(len(items))
        shape = np.full(len(items), shape) if isinstance(shape, int) else shape
        levels = self.levels(items, positions[plans, items])
        places = self.in_steps(levels, shape)
        lower = tables.next_level.take(places)
        if not len(tables.caches):
            (plans,) = (lower >= 0).nonzero()
            return plans, items[plans], lower[plans]
        effects = tables.effects.take(places)
        together = effects == TOGETHER
        (own,) = ((lower >= 0) & ~together).nonzero()
        (with_cache,) = (effects == WITH_CACHE).nonzero()
        (shared,) = together.nonzero()
        parts = [(own, items[own], lower[own])]
        if len(with_cache):
            caches = ladder.counterpart_array[items[with_cache]]
            parts.append((with_cache, caches, np.full_like(caches, ladder.removed_cache)))
        if len(shared):
            levels = self.levels(tables.caches, positions[shared[:, None], tables.caches])
            nexts = tables.next_level.take(self.in_steps(levels, shape[shared, None]))
            rows, caches = (nexts == lower[shared, None]).nonzero()
            parts.append((shared[rows], tables.caches[caches], lower[shared[rows]]))
        if len(parts) == 1:
            return parts[0]
        plans, moved, lower = (np.concatenate(each) for each in zip(*parts, strict=True))
        return plans, moved, lower

    def lowered(self, positions: Counts, items: Counts, shape: Any = 0) -> Counts:
        """The positions after an item of each plan, with its companions, was lowered."""
        after = positions.copy()
        plans, moved, lower = self.moves(positions, items, shape)
        after[plans, moved] = lower
        return after


def column(shape: Any) -> Any:
    """Numbers of shapes as a column, so that they are those of all items of a plan."""
    return shape[:, None] if isinstance(shape, np.ndarray) else shape

"""Exact bytes while the items of a ladder are lowered one by one. Without torch.

A plan's peak bytes are a constant, plus the bytes of each item at its level, plus what items
share. Three parts are shared: the workspace is smaller once no FFN block is left, larger while a
lowered cache is left, and, unless the model's own weights are packed, larger while lowered weights
are left. `rap_env.memory` defines the arithmetic. None of it depends on the budget, so it is
cached for each batch size and sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from rap_env.costs import Counts
from rap_env.errors import InfeasibleBudgetError
from rap_env.ladder.items import Item, Ladder
from rap_env.levels import CacheLevel
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan
from rap_env.request import Request

_CACHED_SHAPES = 256  # some tens of kilobytes each
_CACHED_STEPS = 64

# Three counters in one integer: kept FFN blocks, lowered caches, lowered weights.
_FFN, _CACHE, _WEIGHTS = 1, 1 << 20, 1 << 40
FFN_BITS, CACHE_BITS, WEIGHTS_BITS = _CACHE - 1, _WEIGHTS - _CACHE, (1 << 60) - _WEIGHTS
"""The bits of each counter."""


@dataclass(frozen=True, eq=False)
class SharedBytes:
    """Bytes that items share.

    Attributes:
        last_ffn: Bytes by which the workspace shrinks when the last FFN block is removed.
        lowered_cache: Bytes that attention needs while at least one lowered cache is left.
        lowered_weights: Bytes that at least one lowered block, or lowered embeddings, needs.
    """

    last_ffn: int
    lowered_cache: int
    lowered_weights: int

    def of(self, counters: int) -> int:
        """The shared bytes of the items that `counters` counts."""
        return (
            (0 if counters & FFN_BITS else -self.last_ffn)
            + (self.lowered_cache if counters & CACHE_BITS else 0)
            + (self.lowered_weights if counters & WEIGHTS_BITS else 0)
        )


@dataclass(frozen=True, eq=False)
class LevelSteps:
    """The level to which lowering takes each item from each of its levels.

    Requests of most lengths skip the same levels, so that they share these steps.

    Attributes:
        ladder: The items.
        next_level: Position of the next level, -1 if there is none, (items, W), read-only. Levels
            of a cache that need no fewer bytes than the level above them are skipped, such as a
            window that is longer than the sequence.
    """

    ladder: Ladder
    next_level: Counts

    @cached_property
    def nexts(self) -> list[list[int]]:
        """`next_level` as Python integers, which are faster one at a time."""
        return _lists(self.next_level)

    @cached_property
    def lowest(self) -> Counts:
        """The position of each item's level once no action is valid, (items,)."""
        items = np.arange(len(self.ladder))
        found = np.zeros(len(items), dtype=np.int64)
        while (lower := self.next_level[items, found]).max() >= 0:
            found = np.where(lower >= 0, lower, found)
        partners = self.ladder.partner_array
        gone = partners[(found == self.ladder.removal_array) & (partners != items)]
        found[gone] = [len(self.ladder.items[cache].levels) for cache in gone]
        return found


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
        counters: What each level of an item adds to the counters of `SharedBytes`, (items, W).
        counts: The same as Python integers.
        steps: The level to which lowering takes each item.
    """

    ladder: Ladder
    dense_peak_bytes: int
    kv_cache_bytes: int
    constant_bytes: int
    shared: SharedBytes
    item_bytes: Counts
    counters: Counts
    counts: list[list[int]]
    steps: LevelSteps

    @cached_property
    def sizes(self) -> list[list[int]]:
        """`item_bytes` as Python integers, which are faster one at a time."""
        return _lists(self.item_bytes)

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no action is valid.

        Every sequence of valid actions ends there. Some plan on the way may need slightly less,
        because of what items share.
        """
        held, counters = self.held(self.steps.lowest)
        return held + self.shared.of(counters)

    @property
    def _items(self) -> Counts:
        return self.ladder.item_array

    @cached_property
    def _first_levels(self) -> Counts:
        """Where the levels of each item begin if those of all items are in one row, (items,)."""
        return self._items * self.ladder.width

    def held(self, positions: Sequence[int] | Counts) -> tuple[int, int]:
        """Bytes that do not depend on several levels, and the counters, of some levels."""
        held = self.item_bytes[self._items, positions].sum()
        return self.constant_bytes + int(held), int(self.counters[self._items, positions].sum())

    def peaks(self, positions: Counts) -> Counts:
        """Peak bytes of many plans, (n,), from the positions of their levels, (n, items)."""
        levels = positions + self._first_levels  # read faster than pairs of indices
        held = self.constant_bytes + self.item_bytes.take(levels).sum(axis=1)
        counters = self.counters.take(levels).sum(axis=1)
        held -= self.shared.last_ffn * (counters & FFN_BITS == 0)
        held += self.shared.lowered_cache * (counters & CACHE_BITS != 0)
        return np.asarray(held + self.shared.lowered_weights * (counters & WEIGHTS_BITS != 0))

    def freed_bytes(self, positions: Sequence[int] | Counts) -> Counts:
        """Bytes that the next level of each item frees, shared ones left out, (items,)."""
        items, where = self._items, np.asarray(positions)
        lower, partners = self.steps.next_level[items, where], self.ladder.partner_array
        takes = (lower == self.ladder.removal_array) & (partners != items)
        freed = self.item_bytes[items, where] - self.item_bytes[items, lower]
        freed += self.item_bytes[partners, where[partners]] * takes
        return np.asarray(freed * (lower >= 0))

    def tracker(self, positions: Sequence[int] | None = None) -> LevelTracker:
        """A tracker that starts with levels at some positions, by default native ones."""
        return LevelTracker(self, positions)

    def lower_until_fits(
        self, steps: Sequence[tuple[int, int]], budget_bytes: int
    ) -> CompressionPlan:
        """Follow an order of steps until the request fits.

        A step is an item and the position of the level that it shall have; steps to levels that
        the request skips, or that are not below the item's level, are left out. Where the steps
        end, the plan has the levels that they reached.
        """
        tracker, nexts = self.tracker(), self.steps.nexts
        for item, position in steps:
            if tracker.peak_bytes <= budget_bytes:
                break
            if nexts[item][tracker.positions[item]] == position:
                tracker.lower(item)
        return self.ladder.plan(tracker.positions)


def _lists(array: Counts) -> list[list[int]]:
    found: list[list[int]] = array.tolist()
    return found


class LevelTracker:
    """Peak bytes of one request while items are lowered one by one.

    Attributes:
        positions: The position of each item's level, (items,); see `Ladder.positions`.
        peak_bytes: Peak bytes now.
    """

    __slots__ = (
        "_counters", "_counts", "_held", "_ladder", "_nexts", "_partners", "_removals", "_shared",
        "_sizes", "peak_bytes", "positions",
    )  # fmt: skip

    def __init__(self, costs: LadderCosts, positions: Sequence[int] | None = None) -> None:
        ladder = self._ladder = costs.ladder
        self._sizes, self._counts, self._nexts = costs.sizes, costs.counts, costs.steps.nexts
        self._partners, self._removals = ladder.partners, ladder.removals
        self._shared = costs.shared
        self.positions = [0] * len(ladder) if positions is None else list(positions)
        self._held, self._counters = costs.held(self.positions)
        self.peak_bytes = self._held + self._shared.of(self._counters)

    def is_valid(self, item: int) -> bool:
        """Whether an item has a lower level."""
        return self._nexts[item][self.positions[item]] >= 0

    def freed_bytes(self, item: int) -> int:
        """Bytes that the item's next level frees, shared ones left out; 0 if there is none.

        What other items free that are taken with it does not count.
        """
        return self._change(item)[0]

    def peak_after(self, item: int) -> int:
        """Peak bytes if an item is lowered that has a lower level."""
        held, counters = self._held, self._counters
        for one in self.takers(item):
            freed, counted = self._change(one)
            held, counters = held - freed, counters - counted
        return held + self._shared.of(counters)

    def positions_after(self, item: int) -> list[int]:
        """The positions of the levels after an item, and all taken with it, is lowered."""
        positions = self.positions.copy()
        for one in self.takers(item):
            self._move(one, positions)
        return positions

    def lower(self, item: int) -> set[int]:
        """Lower an item that has a lower level, and all that are taken with it.

        Returns:
            The items whose level, or whose freed bytes, changed.
        """
        lowered = self.takers(item)
        for one in lowered:  # levels of caches taken together do not change each other's bytes
            freed, counted = self._change(one)
            self._held -= freed
            self._counters -= counted
            self._move(one, self.positions)
        self.peak_bytes = self._held + self._shared.of(self._counters)
        return {*lowered, *[self._partners[one] for one in lowered]}

    def takers(self, item: int) -> tuple[int, ...]:
        """The items that are lowered with one, itself included."""
        if self._nexts[item][self.positions[item]] in self._ladder.shared_positions:
            return self._ladder.takers(item, lambda n: self._nexts[n][self.positions[n]])
        return (item,)

    def _change(self, item: int) -> tuple[int, int]:
        """Bytes and counters that one item's next level takes away."""
        position = self.positions[item]
        lower = self._nexts[item][position]
        if lower < 0:
            return 0, 0
        sizes, counts = self._sizes[item], self._counts[item]
        freed, counted = sizes[position] - sizes[lower], counts[position] - counts[lower]
        if lower == self._removals[item] and (partner := self._partners[item]) != item:
            freed += self._sizes[partner][self.positions[partner]]
            counted += self._counts[partner][self.positions[partner]]
        return freed, counted

    def _move(self, item: int, positions: list[int]) -> None:
        """Move an item to its next level, if it has one."""
        lower = self._nexts[item][positions[item]]
        if lower >= 0:
            positions[item] = lower
            if lower == self._removals[item] and (partner := self._partners[item]) != item:
                positions[partner] = len(self._ladder.items[partner].levels)


class LadderBytes:
    """Makes the costs of a ladder for requests on one model; the most recent ones are cached."""

    def __init__(self, memory: MemoryModel, ladder: Ladder) -> None:
        self.memory = memory
        self.ladder = ladder
        shape = len(ladder), ladder.width
        self._weights = np.zeros(shape, dtype=np.int64)
        self._counters = np.zeros(shape, dtype=np.int64)
        facts = memory.facts
        for number, item in enumerate(ladder.items):
            known = _weight_bytes(memory, item)
            for position, level in enumerate(item.levels):
                self._weights[number, position] = known.get(level, 0)
                self._counters[number, position] = _counted(item, level)
        self._counts = _lists(self._counters)
        in_ladder = sum(item.kind == "ffn" for item in ladder.items)
        self._fixed_ffn = facts.num_layers - in_ladder  # FFN blocks that are always kept
        self._widen = 0 if facts.packed else facts.widen_bytes
        self._cache_levels = [CacheLevel.of(name) for name in ("native", *ladder.cache_levels)]
        self._caches: dict[tuple[int | None, ...], list[int]] = {}  # items that need equal bytes
        for number in ladder.caches:
            shape_of_cache = memory.cache_shape(ladder.items[number].layer or 0)
            self._caches.setdefault(shape_of_cache, []).append(number)
        self._takes_cache = [  # attention blocks whose cache has no level of its own
            n
            for n, item in enumerate(ladder.items)
            if item.kind == "attn" and "removed" in item.levels and ladder.partners[n] == n
        ]
        self.cached_costs = lru_cache(_CACHED_SHAPES)(self._make)
        self._steps_of = lru_cache(_CACHED_STEPS)(self._make_steps)

    def costs(self, batch_size: int, seq_len_tokens: int) -> LadderCosts:
        """The costs of a batch size and a sequence length.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
        """
        return self.cached_costs(batch_size, seq_len_tokens)

    def check_feasible(self, request: Request) -> None:
        """Reject a budget that no levels of the ladder can meet.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
            InfeasibleBudgetError: With every item at its lowest level, the request needs more.
        """
        least = self.costs(request.batch_size, request.seq_len_tokens).least_peak_bytes
        if request.budget_bytes < least:
            raise InfeasibleBudgetError(
                f"No levels of {self.memory.facts.name} in this ladder fit "
                f"{request.budget_bytes:,} bytes for {request.batch_size} x "
                f"{request.seq_len_tokens} tokens: the lowest ones need {least:,} bytes. Raise the "
                "budget, name lower levels, or pass infeasible='clip' to the environment to serve "
                "the nearest budget that can be met."
            )

    def _make(self, batch_size: int, seq_len_tokens: int) -> LadderCosts:
        memory, items = self.memory, self.ladder.items
        request = Request(batch_size, seq_len_tokens, budget_bytes=1)
        dense_peak_bytes = memory.dense_peak_bytes(batch_size, seq_len_tokens)
        sizes = self._weights.copy()
        if self._takes_cache:
            native = memory.kv_bytes_by_layer(batch_size, seq_len_tokens)
            for number in self._takes_cache:
                kept = [n != "removed" for n in items[number].levels]
                sizes[number, : len(kept)] += native[items[number].layer] * np.array(kept)
        nexts = []
        for numbers in self._caches.values():
            layer = items[numbers[0]].layer or 0
            held = [
                memory.cache_bytes(level, layer, batch_size, seq_len_tokens)
                for level in self._cache_levels
            ]
            sizes[numbers, : len(held)] = held
            nexts.append(_next_smaller(held))
        sizes.flags.writeable = False
        workspace, without = (memory.workspace_bytes(request, any_ffn) for any_ffn in (True, False))
        # A model whose FFN blocks are not all in the ladder always keeps one.
        last_ffn = 0 if self._fixed_ffn else workspace - without
        return LadderCosts(
            self.ladder,
            dense_peak_bytes,
            memory.kv_cache_bytes(batch_size, seq_len_tokens),
            dense_peak_bytes - int(sizes[:, 0].sum()),
            SharedBytes(last_ffn, self._attention_workspace(request), self._widen),
            sizes,
            self._counters,
            self._counts,
            self._steps_of(tuple(nexts)),
        )

    def _make_steps(self, nexts: tuple[tuple[int, ...], ...]) -> LevelSteps:
        """The steps of requests with these next levels of caches, for each shape of a cache."""
        next_level = np.full(self._weights.shape, -1, dtype=np.int64)
        for number, item in enumerate(self.ladder.items):
            next_level[number, : len(item.levels) - 1] = range(1, len(item.levels))
        for numbers, lower in zip(self._caches.values(), nexts, strict=True):
            next_level[numbers, : len(lower)] = lower
        next_level.flags.writeable = False
        return LevelSteps(self.ladder, next_level)

    def _attention_workspace(self, request: Request) -> int:
        return self.memory.attention_workspace_bytes(request) if self._caches else 0


def _next_smaller(held: Sequence[int]) -> tuple[int, ...]:
    """The position of the next level that needs fewer bytes than each level, -1 without one."""
    return tuple(
        next((n for n in range(p + 1, len(held)) if held[n] < held[p]), -1)
        for p in range(len(held))
    )


def _weight_bytes(memory: MemoryModel, item: Item) -> dict[str, int]:
    """Bytes of an item that is no cache, by level."""
    facts = memory.facts
    if item.layer is None:
        return {str(level): size for level, size in facts.embedding_levels.items()}
    if item.kind == "cache":
        return {}
    index = 2 * item.layer + (item.kind == "ffn")
    return {str(level): size for level, size in facts.weight_levels(index).items()}


def _counted(item: Item, level: str) -> int:
    """What a level of an item adds to the counters."""
    if item.kind == "cache":
        return 0 if level == "native" else _CACHE
    kept_ffn = _FFN if item.kind == "ffn" and level != "removed" else 0
    return kept_ffn + (0 if level in ("native", "removed") else _WEIGHTS)

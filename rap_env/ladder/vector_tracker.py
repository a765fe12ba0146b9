"""Exact bytes of many requests while their items are lowered: `LevelTracker` as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rap_env.costs import Counts, Flags
from rap_env.ladder.items import Ladder
from rap_env.ladder.state import LadderCosts

FFN_BITS, CACHE_BITS, WEIGHTS_BITS = 0xFFFF, 0xFFFF << 20, 0xFFFF << 40


class VectorLevelTracker:
    """Peak bytes of n requests while their items are lowered: `LevelTracker` as arrays.

    Attributes:
        dense_peak_bytes: Peak bytes of each request with the native model, (n,).
        peak_bytes: Peak bytes of each request now, (n,).
        positions: Position of each item's level, (n, items).
        next_level: As in `LadderCosts`, for each request, (n, items, W).
        item_bytes: As in `LadderCosts`, for each request, (n, items, W).
    """

    def __init__(self, count: int, ladder: Ladder) -> None:
        shape = count, len(ladder), ladder.width
        self.dense_peak_bytes, self.peak_bytes = _zeros(count), _zeros(count)
        self.positions = np.zeros(shape[:2], dtype=np.int64)
        self.item_bytes = np.zeros(shape, dtype=np.int64)
        self.next_level = np.zeros(shape, dtype=np.int64)
        self._counts = np.zeros(shape[1:], dtype=np.int64)
        self._held, self._counters, self._constant = _zeros(count), _zeros(count), _zeros(count)
        self._last_ffn, self._cache, self._weights = _zeros(count), _zeros(count), _zeros(count)
        self._caches = np.array(ladder.caches, dtype=np.int64)
        self._is_cache = np.isin(np.arange(len(ladder)), self._caches)
        self._is_shared = np.isin(np.arange(ladder.width), list(ladder.shared_positions))
        self._partners, self._removal = np.array(ladder.partners), np.array(ladder.removals)
        self._gone = np.array([len(item.levels) for item in ladder.items])
        self._takes_cache = (self._removal >= 0) & (self._partners != np.arange(len(ladder)))

    def start(
        self, rows: Counts, costs: Sequence[LadderCosts], positions: Sequence[int] | Counts
    ) -> None:
        """Start the requests `rows`, (m,), all with levels at some positions, (items,)."""
        self.dense_peak_bytes[rows] = [one.dense_peak_bytes for one in costs]
        self.positions[rows] = positions
        self.item_bytes[rows] = [one.item_bytes for one in costs]
        self.next_level[rows] = [one.steps.next_level for one in costs]
        self._constant[rows] = [one.constant_bytes for one in costs]
        flags = costs[0].flags.astype(np.int64)
        self._counts = (flags & 1) | ((flags & 2) >> 1 << 20) | ((flags & 4) >> 2 << 40)
        self._last_ffn[rows] = [one.shared.last_ffn for one in costs]
        self._cache[rows] = [one.shared.lowered_cache for one in costs]
        self._weights[rows] = [one.shared.lowered_weights for one in costs]
        self._held[rows], self._counters[rows] = self._held_by(rows, self.positions[rows])
        self.peak_bytes[rows] = self._peak(rows, self._held[rows], self._counters[rows])

    def peak_after(self, items: Counts, lowers: Flags) -> Counts:
        """Peak bytes of each request, (n,), if those with a flag lower an item that can be."""
        held, counters, *_ = self._after(items, lowers)
        return self._peak(slice(None), held, counters)

    def peaks_of(self, rows: Counts, positions: Counts) -> Counts:
        """Peak bytes of whole plans, (m,), whatever was lowered so far.

        `rows` has the request of each plan, (m,), and `positions` those of its levels, (m, items).
        """
        return self._peak(rows, *self._held_by(rows, positions))

    def nexts_of(self, rows: Counts, positions: Counts) -> Counts:
        """The position of each item's next level in whole plans, -1 without one, (m, items)."""
        items = np.arange(positions.shape[1])
        return np.asarray(self.next_level[rows[:, None], items, positions])

    def freed_of(self, rows: Counts, positions: Counts) -> Counts:
        """Bytes that the next level of each item of whole plans frees, (m, items)."""
        items, which = np.arange(positions.shape[1]), rows[:, None]
        lower = self.nexts_of(rows, positions)
        freed, _ = self._change(which, items, positions, lower, positions[:, self._partners])
        return np.asarray(freed * (lower >= 0))

    def lowered(self, rows: Counts, positions: Counts, items: Counts) -> Counts:
        """The positions of whole plans after items, (m,), were lowered, (m, items)."""
        lower = self.nexts_of(rows, positions)
        ours = np.take_along_axis(lower, items[:, None], axis=1)
        taken = np.arange(positions.shape[1]) == items[:, None]
        shared = self._is_cache[items] & (ours[:, 0] >= 0) & self._is_shared[ours[:, 0]]
        taken |= shared[:, None] & self._is_cache & (lower == ours)
        found = np.where(taken & (lower >= 0), lower, positions)
        blocks = np.flatnonzero(self._takes_cache)
        caches = self._partners[blocks]
        gone = found[:, blocks] == self._removal[blocks]
        found[:, caches] = np.where(gone, self._gone[caches], found[:, caches])
        return found

    def freed_bytes(self, rows: Counts, items: Counts) -> Counts:
        """Bytes that the next levels of items free, as `LevelTracker` has it, (k,).

        `rows` has the request of each item, (k,).
        """
        position = self.positions[rows, items]
        lower = self.next_level[rows, items, position]
        other = self.positions[rows, self._partners[items]]
        freed, _ = self._change(rows, items, position, lower, other)
        return np.asarray(freed * (lower >= 0))

    def lower(self, items: Counts, lowers: Flags, peak_bytes: Counts) -> tuple[Counts, Counts]:
        """Lower items where there is a flag; all (n,), as `peak_after` has.

        Returns:
            Requests and items whose level, or whose freed bytes, changed, (k,) each.
        """
        self._held, self._counters, rows, lowered, lower = self._after(items, lowers)
        self.peak_bytes = peak_bytes
        self.positions[rows, lowered] = lower
        partners = self._partners[lowered]
        takes = (lower == self._removal[lowered]) & (partners != lowered)
        self.positions[rows[takes], partners[takes]] = self._gone[partners[takes]]
        return np.concatenate([rows, rows]), np.concatenate([lowered, partners])

    def _after(self, items: Counts, lowers: Flags) -> tuple[Counts, Counts, Counts, Counts, Counts]:
        """Bytes and counters after lowering, (n,); lowered items and their new levels, (k,).

        The last three are requests, items and positions of levels.
        """
        rows = np.flatnonzero(lowers)
        lowered = items[rows]
        position = self.positions[rows, lowered]
        lower = self.next_level[rows, lowered, position]
        shared = self._is_cache[lowered] & self._is_shared[lower]
        if shared.any():
            others = np.flatnonzero(shared)
            every = self.positions[rows[others]][:, self._caches]
            nexts = self.next_level[rows[others, None], self._caches, every]
            same, cache = np.nonzero(nexts == lower[others, None])
            taken = rows[others[same]]
            rows = np.concatenate([rows[~shared], taken])
            lowered = np.concatenate([lowered[~shared], self._caches[cache]])
            position = self.positions[rows, lowered]
            lower = self.next_level[rows, lowered, position]
        other = self.positions[rows, self._partners[lowered]]
        freed, counted = self._change(rows, lowered, position, lower, other)
        held, counters = self._held.copy(), self._counters.copy()
        np.subtract.at(held, rows, freed)
        np.subtract.at(counters, rows, counted)
        return held, counters, rows, lowered, lower

    def _change(
        self, rows: Counts, items: Counts, position: Counts, lower: Counts, other: Counts
    ) -> tuple[Counts, Counts]:
        """Bytes and counters that new levels of items take away; `other` is of their partners."""
        partners = self._partners[items]
        takes = (lower == self._removal[items]) & (partners != items)
        freed = self.item_bytes[rows, items, position] - self.item_bytes[rows, items, lower]
        freed += self.item_bytes[rows, partners, other] * takes
        counted = self._counts[items, position] - self._counts[items, lower]
        counted += self._counts[partners, other] * takes
        return freed, counted

    def _held_by(self, rows: Counts, positions: Counts) -> tuple[Counts, Counts]:
        """Bytes without the shared ones, and counters, of whole plans, (m,)."""
        items = np.arange(positions.shape[1])
        held = self._constant[rows] + self.item_bytes[rows[:, None], items, positions].sum(axis=1)
        return np.asarray(held), np.asarray(self._counts[items, positions].sum(axis=1))

    def _peak(self, rows: Counts | slice, held: Counts, counters: Counts) -> Counts:
        peak = held - self._last_ffn[rows] * (counters & FFN_BITS == 0)
        peak += self._cache[rows] * (counters & CACHE_BITS != 0)
        return np.asarray(peak + self._weights[rows] * (counters & WEIGHTS_BITS != 0))


def _zeros(count: int) -> Counts:
    return np.zeros(count, dtype=np.int64)

"""Exact bytes of many requests while their items are lowered: `LevelTracker` as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rap_env.costs import Counts, Flags
from rap_env.ladder.item_bytes import CACHE_BITS, FFN_BITS, WEIGHTS_BITS, LadderCosts
from rap_env.ladder.items import Ladder


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
        self._held, self._counters = _zeros(count), _zeros(count)
        self._last_ffn, self._cache, self._weights = _zeros(count), _zeros(count), _zeros(count)
        self._caches = np.array(ladder.caches, dtype=np.int64)
        self._is_cache = np.isin(np.arange(len(ladder)), self._caches)
        self._is_shared = np.isin(np.arange(ladder.width), list(ladder.shared_positions))
        self._partners = np.array(ladder.partners)
        self._removal = np.array(ladder.removals)
        self._gone = np.array([len(item.levels) for item in ladder.items])

    def start(self, row: int, costs: LadderCosts, positions: Sequence[int]) -> None:
        """Start request `row` with levels at some positions."""
        self.dense_peak_bytes[row] = costs.dense_peak_bytes
        self._held[row], self._counters[row] = held, counters = costs.held(positions)
        self.peak_bytes[row] = held + costs.shared.of(counters)
        self.positions[row] = positions
        self.item_bytes[row], self.next_level[row] = costs.item_bytes, costs.next_level
        self._counts = costs.counters  # the same for all requests
        self._last_ffn[row] = costs.shared.last_ffn
        self._cache[row] = costs.shared.lowered_cache
        self._weights[row] = costs.shared.lowered_weights

    def peak_after(self, items: Counts, lowers: Flags) -> Counts:
        """Peak bytes of each request, (n,), if those with a flag lower an item that can be."""
        held, counters, *_ = self._after(items, lowers)
        return self._peak(held, counters)

    def freed_bytes(self, rows: Counts, items: Counts) -> Counts:
        """Bytes that the next levels of items free, as `LevelTracker` has it, (k,).

        `rows` has the request of each item, (k,).
        """
        position = self.positions[rows, items]
        lower = self.next_level[rows, items, position]
        freed, _ = self._change(rows, items, position, lower)
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
        freed, counted = self._change(rows, lowered, position, lower)
        held, counters = self._held.copy(), self._counters.copy()
        np.subtract.at(held, rows, freed)
        np.subtract.at(counters, rows, counted)
        return held, counters, rows, lowered, lower

    def _change(
        self, rows: Counts, items: Counts, position: Counts, lower: Counts
    ) -> tuple[Counts, Counts]:
        """Bytes and counters that new levels of items take away, (k,) each."""
        partners = self._partners[items]
        other = self.positions[rows, partners]
        takes = (lower == self._removal[items]) & (partners != items)
        freed = self.item_bytes[rows, items, position] - self.item_bytes[rows, items, lower]
        freed += self.item_bytes[rows, partners, other] * takes
        counted = self._counts[items, position] - self._counts[items, lower]
        counted += self._counts[partners, other] * takes
        return freed, counted

    def _peak(self, held: Counts, counters: Counts) -> Counts:
        peak = held - self._last_ffn * (counters & FFN_BITS == 0)
        peak += self._cache * (counters & CACHE_BITS != 0)
        return np.asarray(peak + self._weights * (counters & WEIGHTS_BITS != 0))


def _zeros(count: int) -> Counts:
    return np.zeros(count, dtype=np.int64)

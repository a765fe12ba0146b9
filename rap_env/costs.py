"""Bytes that each removal frees for a request, and trackers of the peak while blocks are removed.

A mask's peak bytes are the dense model's, minus what each removed block frees, minus what the
workspace shrinks by when no FFN block is left. None of it depends on the budget, so it is cached
for each batch size and sequence length. `rap_env.memory` defines the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

_CACHED_SHAPES = 4096  # a few kilobytes each


@dataclass(frozen=True, eq=False)
class RequestCosts:
    """Bytes of one batch size and sequence length on one model (2L blocks).

    Attributes:
        dense_peak_bytes: Peak bytes of the unpruned model.
        kv_cache_bytes: Bytes of its KV cache.
        freed_bytes: Weight and cache bytes that each block's removal frees, minus the bytes of its
            stub, (2L,), read-only.
        last_ffn_bytes: Bytes by which the workspace shrinks when the last FFN block is removed.
    """

    dense_peak_bytes: int
    kv_cache_bytes: int
    freed_bytes: Counts
    last_ffn_bytes: int

    @cached_property
    def freed(self) -> tuple[int, ...]:
        """`freed_bytes` as Python integers, which are faster one at a time."""
        return tuple(self.freed_bytes.tolist())

    @cached_property
    def freed_share(self) -> npt.NDArray[np.float32]:
        """What each block's removal frees as a share of the dense peak, (2L,), read-only."""
        share = freed_share(self.freed_bytes, self.dense_peak_bytes)
        share.flags.writeable = False
        return share

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes with every block removed: no mask needs less."""
        return self.dense_peak_bytes - int(self.freed_bytes.sum()) - self.last_ffn_bytes

    def peak_bytes(self, removed: Collection[int]) -> int:
        """Peak bytes without the `removed` blocks, given by index."""
        return self.tracker(removed).peak_bytes

    def tracker(self, removed: Collection[int] = ()) -> ByteTracker:
        """A tracker that starts with the `removed` blocks, given by index."""
        return ByteTracker(self.dense_peak_bytes, self.freed, self.last_ffn_bytes, removed)

    def remove_until_fits(self, order: Iterable[int], budget_bytes: int) -> Plan:
        """The shortest prefix of an order that fits the budget, or all of it if none does."""
        tracker, removed = self.tracker(), []
        for index in order:
            if tracker.peak_bytes <= budget_bytes:
                break
            tracker.remove(int(index))
            removed.append(int(index))
        return Plan.removing(*removed)


def freed_share(freed_bytes: Counts, dense_peak_bytes: int | Counts) -> npt.NDArray[np.float32]:
    """Freed bytes as a share of the peak of the unchanged model, in [0, 1]."""
    return np.clip(freed_bytes / dense_peak_bytes, 0.0, 1.0).astype(np.float32)


class ByteTracker:
    """Peak bytes of one request while blocks are removed one by one.

    Args:
        dense_peak_bytes: Peak bytes with every block.
        freed: Bytes that each block's removal frees, length 2L.
        last_ffn_bytes: Bytes that the removal of the last FFN block frees in addition.
        removed: Indices of the blocks that are removed already, each once.

    Attributes:
        peak_bytes: Peak bytes now.
    """

    __slots__ = ("_ffn_left", "_freed", "_last_ffn_bytes", "peak_bytes")

    def __init__(
        self,
        dense_peak_bytes: int,
        freed: Sequence[int],
        last_ffn_bytes: int,
        removed: Collection[int] = (),
    ) -> None:
        self._freed = freed
        self._last_ffn_bytes = last_ffn_bytes
        self._ffn_left = len(freed) // 2 - sum(index % 2 for index in removed)
        self.peak_bytes = dense_peak_bytes - sum(freed[index] for index in removed)
        if not self._ffn_left:
            self.peak_bytes -= last_ffn_bytes

    def peak_without(self, index: int) -> int:
        """Peak bytes if the kept block `index` is removed too."""
        peak = self.peak_bytes - self._freed[index]
        return peak - self._last_ffn_bytes if index % 2 and self._ffn_left == 1 else peak

    def remove(self, index: int) -> None:
        """Remove the kept block `index`."""
        self.peak_bytes = self.peak_without(index)
        self._ffn_left -= index % 2


class VectorByteTracker:
    """Peak bytes of n requests while blocks are removed from each one: `ByteTracker` as arrays.

    Attributes:
        dense_peak_bytes: Peak bytes of each request with every block, (n,).
        peak_bytes: Peak bytes of each request now, (n,).
        freed_bytes: Bytes that each block's removal frees, (n, 2L).
    """

    def __init__(self, count: int, num_blocks: int) -> None:
        self.dense_peak_bytes = np.zeros(count, dtype=np.int64)
        self.peak_bytes = np.zeros(count, dtype=np.int64)
        self.freed_bytes = np.zeros((count, num_blocks), dtype=np.int64)
        self._last_ffn_bytes = np.zeros(count, dtype=np.int64)
        self._ffn_left = np.zeros(count, dtype=np.int64)
        self._rows = np.arange(count)

    def start(
        self, rows: Counts, costs: Sequence[RequestCosts], removed: Collection[int] = ()
    ) -> None:
        """Start the requests `rows`, (m,), all with the `removed` blocks, given by index."""
        self.dense_peak_bytes[rows] = [one.dense_peak_bytes for one in costs]
        self.freed_bytes[rows] = [one.freed_bytes for one in costs]
        self._last_ffn_bytes[rows] = [one.last_ffn_bytes for one in costs]
        gone = np.zeros((1, self.freed_bytes.shape[1]), dtype=bool)
        gone[0, list(removed)] = True
        self._ffn_left[rows] = np.count_nonzero(~gone[0, 1::2])
        self.peak_bytes[rows] = self.peaks_of(rows, gone)

    def peak_without(self, index: Counts, removes: Flags) -> Counts:
        """Peak bytes of each request, (n,), if those with a flag lose the kept block `index`."""
        freed = self.freed_bytes[self._rows, index]
        freed += self._last_ffn_bytes * (self._ffn_left == 1) * (index % 2)
        return np.asarray(self.peak_bytes - freed * removes)

    def remove(self, index: Counts, removes: Flags, peak_bytes: Counts) -> None:
        """Remove the kept blocks `index` where there is a flag; all (n,), as `peak_without` has."""
        self.peak_bytes = peak_bytes
        self._ffn_left -= index % 2 * removes

    def peaks_of(self, rows: Counts, removed: Flags) -> Counts:
        """Peak bytes of whole masks, (m,), whatever was removed so far.

        `rows` has the request of each mask, (m,), and `removed` the blocks it removes, (m, 2L).
        """
        peak = self.dense_peak_bytes[rows] - (self.freed_bytes[rows] * removed).sum(axis=1)
        peak -= self._last_ffn_bytes[rows] * removed[:, 1::2].all(axis=1)
        return np.asarray(peak)


@lru_cache(maxsize=_CACHED_SHAPES, typed=True)
def request_costs(memory: MemoryModel, batch_size: int, seq_len_tokens: int) -> RequestCosts:
    """The costs of a batch size and a sequence length; the most recent ones are cached.

    Raises:
        InvalidRequestError: The model cannot serve the batch or the length.
    """
    request = Request(batch_size, seq_len_tokens, budget_bytes=1)
    dense_peak_bytes = memory.dense_peak_bytes(batch_size, seq_len_tokens)
    freed_bytes = memory.freed_bytes(request)
    freed_bytes.flags.writeable = False
    workspace, without_ffn = (memory.workspace_bytes(request, any_ffn) for any_ffn in (True, False))
    return RequestCosts(
        dense_peak_bytes,
        memory.kv_cache_bytes(batch_size, seq_len_tokens),
        freed_bytes,
        workspace - without_ffn,
    )

"""What each removal frees for a request: looked up and subtracted instead of added up anew.

A mask's peak bytes are the dense model's, less what each removed block frees, less what the
workspace shrinks by when no FFN block is left. None of it depends on the budget, so it is kept
for each batch size and sequence length; `rap_env.memory` remains the one place of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request

_KEPT_SHAPES = 4096  # of a few kilobytes each


@dataclass(frozen=True, eq=False)
class RequestCosts:
    """Bytes of one batch size and sequence length on one model (2L blocks).

    Attributes:
        dense_peak_bytes: Peak bytes of the unpruned model.
        kv_cache_bytes: Bytes of its KV cache.
        freed_bytes: Weight and cache bytes that each block's removal frees, less what its stub
            takes, (2L,), read-only.
        memory: The model's byte arithmetic.
        request: A request with this batch size and length; its budget does not matter.
    """

    dense_peak_bytes: int
    kv_cache_bytes: int
    freed_bytes: npt.NDArray[np.int64]
    memory: MemoryModel = field(repr=False)
    request: Request = field(repr=False)

    @cached_property
    def freed(self) -> tuple[int, ...]:
        """`freed_bytes` as whole numbers of Python, which are faster one at a time."""
        return tuple(self.freed_bytes.tolist())

    @cached_property
    def freed_share(self) -> npt.NDArray[np.float32]:
        """What each block's removal frees as a share of the dense peak, (2L,), read-only."""
        share = np.clip(self.freed_bytes / self.dense_peak_bytes, 0.0, 1.0).astype(np.float32)
        share.flags.writeable = False
        return share

    @cached_property
    def last_ffn_bytes(self) -> int:
        """Bytes by which the workspace shrinks when the last FFN block goes."""
        ffn_blocks = BlockMask(frozenset(range(1, len(self.freed), 2)))
        rest = self.memory.peak_bytes(ffn_blocks, self.request)
        return self.dense_peak_bytes - sum(self.freed[1::2]) - rest

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes that stay whatever is removed, stubs included; but see `last_ffn_bytes`."""
        return self.dense_peak_bytes - int(self.freed_bytes.sum())

    @cached_property
    def least_peak_bytes(self) -> int:
        """Peak bytes with every block removed: no mask needs less."""
        return self.fixed_bytes - self.last_ffn_bytes

    def peak_bytes(self, removed: Collection[int]) -> int:
        """Peak bytes without the `removed` blocks, given by index."""
        peak = self.dense_peak_bytes - sum(self.freed[index] for index in removed)
        no_ffn = sum(index % 2 for index in removed) == len(self.freed_bytes) // 2
        return peak - self.last_ffn_bytes if no_ffn else peak

    def remove_until_fits(self, order: Iterable[int], budget_bytes: int) -> BlockMask:
        """The first blocks of an order, as many as the budget asks for; all if it asks for more."""
        removed: list[int] = []
        for index in order:
            if self.peak_bytes(removed) <= budget_bytes:
                break
            removed.append(int(index))
        return BlockMask.of(*removed)


@lru_cache(maxsize=_KEPT_SHAPES, typed=True)
def request_costs(memory: MemoryModel, batch_size: int, seq_len_tokens: int) -> RequestCosts:
    """The costs of a batch size and a sequence length; those asked for last are kept.

    Raises:
        InvalidRequestError: The model cannot serve the batch or the length.
    """
    request = Request(batch_size, seq_len_tokens, budget_bytes=1)
    memory.check(batch_size, seq_len_tokens)
    freed_bytes = memory.freed_bytes(request)
    freed_bytes.flags.writeable = False
    blocks = int(freed_bytes.sum()) + sum(memory.facts.stub_bytes)  # nothing is removed yet
    peak = memory.facts.base_bytes + blocks + memory.workspace_bytes(request)
    kv = int(memory.kv_bytes_by_layer(batch_size, seq_len_tokens).sum())
    return RequestCosts(peak, kv, freed_bytes, memory, request)

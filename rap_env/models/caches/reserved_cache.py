"""A layer of a native KV cache with room for later tokens.

transformers' own layer copies all keys and values to new memory for each new token. The copies take
time, and the freed ones leave holes in the heap that no later, longer copy fits: with 450 tokens of
the default model they took as much memory as the cache again. A `ReservedLayer` of a service, which
knows how long its rows can get, is allocated once.

Shapes: B sequences (rows), K key and value heads, T tokens held, D channels of a head.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One attention block's keys and values, of shape (B, K, T, D), in memory with room for more.

    Keys and values may be replaced by any others of that shape. Room is then made at the next
    update.

    Args:
        reserve_tokens: Tokens of a row to have room for when memory is allocated. With fewer than
            there are, memory is allocated at every update, as transformers' own layer does.
    """

    keys: Any  # a tensor, or None without rows
    values: Any

    def __init__(self, reserve_tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reserve_tokens = reserve_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values, (B, K, Q, D) each; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(self.keys, key_states)
        self.values = self._appended(self.values, value_states)
        return self.keys, self.values

    def _appended(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not held.numel():
            return with_room([new], new.shape[2], self.reserve_tokens)
        tokens = held.shape[2]
        longer = _extended(held, tokens + new.shape[2])
        if longer is None:
            longer = _allocated(held, held.shape[0], tokens + new.shape[2], self.reserve_tokens)
            longer[:, :, :tokens] = held
        longer[:, :, tokens:] = new
        return longer


def reserve(cache: Any, tokens: int) -> None:
    """Let the layers of a cache have room for `tokens` tokens of a row when they next allocate."""
    for layer in cache.layers:
        if not layer.is_sliding:
            layer.reserve_tokens = tokens


def with_room(rows: Sequence[torch.Tensor], tokens: int, reserve_tokens: int) -> torch.Tensor:
    """Rows of several tensors (b, K, T, D) in new memory, padded on the left to `tokens` tokens.

    Args:
        rows: What to copy; of more than `tokens` tokens the last ones are kept.
        tokens: Tokens of each row of the result.
        reserve_tokens: Tokens of a row to have room for, if that is more.
    """
    made = _allocated(rows[0], sum(len(part) for part in rows), tokens, reserve_tokens)
    first = 0
    for part in rows:
        padding = max(0, tokens - part.shape[2])
        place = made[first : first + len(part)]
        place[:, :, :padding] = 0
        place[:, :, padding:] = part[:, :, part.shape[2] - (tokens - padding) :]
        first += len(part)
    return made


def _allocated(like: torch.Tensor, batch: int, tokens: int, reserve_tokens: int) -> torch.Tensor:
    """A new tensor (B, K, T, D), whose memory has room for `reserve_tokens` tokens."""
    _, heads, _, size = like.shape
    shape = (batch, heads, max(tokens, reserve_tokens), size)
    if reserve_tokens <= tokens:
        return like.new_empty(shape)
    made = own_pages(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(shape)
    return made.zero_()[:, :, :tokens]  # written to, so that the system counts it from now on


def own_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in pages of its own, which return to the system as soon as they are freed.

    In the heap of the C library it would leave a hole between smaller, younger tensors.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < mmap.PAGESIZE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _extended(held: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """The same memory as a tensor of more tokens; None if it has no room for them."""
    batch, heads, _, size = held.shape
    room = held.untyped_storage().nbytes() // (held.itemsize * batch * heads * size)
    strides = (heads * room * size, room * size, size, 1)
    if tokens > room or held.storage_offset() or held.stride() != strides:
        return None
    return held.as_strided((batch, heads, tokens, size), strides)

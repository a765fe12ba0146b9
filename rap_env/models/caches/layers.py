"""Native layers of a KV cache with room for later tokens.

transformers' own layer copies all keys and values to new memory for each new token. The
copies take time, and the freed ones leave holes in the heap that no later, longer copy fits:
with 450 tokens of the default model they took as much memory as the cache again. A
`ReservedLayer` of a service, which knows how long its rows can get, is allocated once.

Shapes: B sequences (rows), K key and value heads, T tokens cached, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.device import own_pages


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One attention block's keys and values, of shape (B, K, T, D), in memory with room for more.

    Keys and values may be replaced by any others of that shape. Room is then made at the next
    update.

    Args:
        reserve_tokens: Tokens of a row to have room for when memory is allocated. With fewer
            than there are, memory is allocated at every update, as transformers' own layer
            does.
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

    def _appended(self, cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not cached.numel():
            return with_room([new], new.shape[2], self.reserve_tokens)
        tokens = cached.shape[2]
        longer = _extended(cached, tokens + new.shape[2])
        if longer is None:
            longer = _allocated(cached, cached.shape[0], tokens + new.shape[2], self.reserve_tokens)
            longer[:, :, :tokens] = cached
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
    if like.device.type == "cpu":
        made = own_pages(math.prod(shape) * like.itemsize).view(like.dtype).view(shape)
    else:
        made = like.new_empty(shape)
    return made.zero_()[:, :, :tokens]  # written to, so that the system counts it from now on


def _extended(cached: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """The same memory as a tensor of more tokens; None if it has no room for them."""
    batch, heads, _, size = cached.shape
    room = cached.untyped_storage().nbytes() // (cached.itemsize * batch * heads * size)
    strides = (heads * room * size, room * size, size, 1)
    if tokens > room or cached.storage_offset() or cached.stride() != strides:
        return None
    return cached.as_strided((batch, heads, tokens, size), strides)


DYNAMIC_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, ReservedLayer, GroupedLayer)
"""Kinds of layers that grow, and can have levels."""


def native_layer(layer: Any) -> Any:
    """An empty dynamic layer with the sliding window of another layer."""
    if layer.is_sliding:
        return DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    return ReservedLayer(reserved_tokens(layer))


def reserved_tokens(layer: Any) -> int:
    """Tokens of a row that a layer gets room for when memory is allocated; 0 for no more room."""
    return layer.reserve_tokens if isinstance(layer, ReservedLayer | GroupedLayer) else 0

"""Layers of a KV cache: native ones with room for later tokens, and bringing layers to their level.

transformers' own layer copies all keys and values to new memory for each new token. The copies take
time, and the freed ones leave holes in the heap that no later, longer copy fits: with 450 tokens of
the default model they took as much memory as the cache again. A `ReservedLayer` of a service, which
knows how long its rows can get, is allocated once.

The cache itself shows the levels that its layers have: a layer below native is a `GroupedLayer`.

Shapes: B sequences (rows), K key and value heads, T tokens cached, D channels of a head.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.caches.batch_cache import BatchCache
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.tensor_file import NativeCopy, NewCopies, TensorFile, native_states
from rap_env.models.device import own_pages
from rap_env.models.families.placeholders import PLACEHOLDER_DTYPE


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


_ROWS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _new_copies(cache: Any) -> NewCopies | None:
    folder = cache.copies if isinstance(cache, BatchCache) else None
    if folder is None:
        return None
    files = functools.cache(lambda rows: [TensorFile(folder) for _ in range(rows)])
    return lambda rows: [NativeCopy(file) for file in files(rows)]  # layers of a row share a file


def note_rows(cache: Any, rows: torch.Tensor | Sequence[int] | None) -> None:
    """Remember the rows of a cache in use, for `lower`.

    Args:
        cache: The cache.
        rows: The padding mask of all its columns, the length of each row, or None for no padding.
    """
    _ROWS[cache] = rows


def known_lengths(cache: Any, batch: int, columns: int) -> list[int] | None:
    """The length of each row after a pass, if it was noted before it; reads no mask."""
    rows = None if cache is None else _ROWS.get(cache)
    if rows is None or isinstance(rows, torch.Tensor):
        return None
    return list(rows) if len(rows) == batch and max(rows) == columns else None


def _lengths(cache: Any, batch: int, columns: int) -> list[int] | None:
    """Tokens of each row without padding; None if they are not known."""
    if cache not in _ROWS:
        return None
    rows = _ROWS[cache]
    if rows is None:
        return [columns] * batch
    if isinstance(rows, torch.Tensor):
        return rows.sum(dim=1).tolist() if rows.shape == (batch, columns) else None
    return list(rows) if len(rows) == batch else None


def lower(
    cache: Any, levels: Mapping[int, CacheLevel], lengths: Sequence[int] | None = None
) -> None:
    """Bring layers of a cache that are above their level down to it, one at a time.

    A layer that would be higher at its level in one respect (width or window) and lower in the
    other gets the lower of both. An empty layer gets its level. A removed block's stays as it is.

    Args:
        cache: The cache.
        levels: Levels of layers; others are native.
        lengths: Tokens of each row in the cache, without padding; by default those noted by
            `note_rows`. If they are not known, layers with tokens are left for the next pass.
    """
    new_copies = _new_copies(cache)
    for number, level in level_changes(cache, levels):
        while len(cache.layers) <= number:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[number]
        copies = None if layer.is_sliding else new_copies
        if not _has_tokens(layer) and level.native:
            cache.layers[number] = native_layer(layer)
        elif not _has_tokens(layer):
            made = GroupedLayer(level, layer.sliding_window if layer.is_sliding else None)
            made.new_copies = copies
            cache.layers[number] = made
        elif isinstance(layer, GroupedLayer):
            cache.layers[number] = layer.lowered(level)
        else:
            rows = lengths
            if rows is None:
                rows = _lengths(cache, layer.keys.shape[0], layer.get_seq_length())
            if rows is not None:
                made = GroupedLayer.of_native(level, layer, rows, copies)
                made.reserve_tokens = reserved_tokens(layer)
                cache.layers[number] = made


def read_back(cache: Any, levels: Mapping[int, CacheLevel]) -> None:
    """Bring layers of a cache that are below their level up to it, where there are copies.

    Tokens that came while a layer was lowered get keys and values as they were computed then.
    """
    for number, layer in filled_layers(cache):
        level = levels.get(number, NATIVE_CACHE)
        if not isinstance(layer, GroupedLayer) or layer.level == level or not all(layer.copies):
            continue
        states = native_states(layer)
        if states is None:
            layer.copies = [None] * len(layer.copies)
            continue
        made: Any = native_layer(layer)
        made.lazy_initialization(*states)
        room = made.reserve_tokens
        made.keys, made.values = (with_room([part], part.shape[2], room) for part in states)
        if not level.native:
            made = GroupedLayer.of_native(level, made, layer.lengths)
            made.copies, made.reserve_tokens = layer.copies, room
        cache.layers[number] = made


def level_changes(cache: Any, levels: Mapping[int, CacheLevel]) -> list[tuple[int, CacheLevel]]:
    """Layers that `lower` changes, with their new levels; raises the errors of `lower`."""
    changes: list[tuple[int, CacheLevel]] = []
    layers = getattr(cache, "layers", ())
    for number in range(max(len(layers), *(layer + 1 for layer in levels), 0)):
        layer = layers[number] if number < len(layers) else None
        level = levels.get(number, NATIVE_CACHE)
        current = layer.level if isinstance(layer, GroupedLayer) else NATIVE_CACHE
        if level is current or level == current:
            continue
        if layer is not None and _has_tokens(layer):
            if layer.keys.dtype == PLACEHOLDER_DTYPE:
                continue
            level = current.lowest(level)
        if level != current:
            changes.append((number, level))
    if changes:
        _check_layers(cache, [number for number, _ in changes])
    return changes


def levels_of(cache: Any, *, lasting: bool = False) -> tuple[tuple[int, CacheLevel], ...]:
    """The layers of a cache that hold tokens below native, with their levels.

    Args:
        cache: The cache.
        lasting: Leave out those that `read_back` can raise.
    """
    return tuple(
        (number, layer.level)
        for number, layer in filled_layers(cache)
        if isinstance(layer, GroupedLayer) and not (lasting and all(layer.copies))
    )


def filled_layers(cache: Any) -> Iterator[tuple[int, Any]]:
    """Layers that hold anything, with their indices."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.dim() == 4:
            yield number, layer


def tensors_of(layer: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of a layer that holds anything."""
    return layer.tensors if isinstance(layer, GroupedLayer) else (layer.keys, layer.values)


def _has_tokens(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.get_seq_length() > 0


def _check_layers(cache: Any, numbers: Sequence[int]) -> None:
    layers = getattr(cache, "layers", None)
    kinds: set[Any] = set()
    for number in numbers:
        if layers is not None and number < len(layers):
            kinds.add(type(layers[number]))
        else:
            kinds.add(getattr(cache, "layer_class_to_replicate", None))
    wrong = sorted(getattr(kind, "__name__", "no layers") for kind in kinds - set(DYNAMIC_LAYERS))
    if wrong or getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            f"A {type(cache).__name__} with {', '.join(wrong) or 'offloaded layers'} cannot be "
            "quantised or windowed; use a DynamicCache, which is the default, or native caches."
        )

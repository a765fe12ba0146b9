"""The levels of the layers of a KV cache in use, and bringing them down.

The cache itself shows the levels that its layers have: a layer below native is a `GroupedLayer`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.reserved_cache import ReservedLayer
from rap_env.models.families.placeholders import PLACEHOLDER_DTYPE

DYNAMIC_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, ReservedLayer, GroupedLayer)
"""Kinds of layers that grow, and can have levels."""


def native_layer(layer: Any) -> Any:
    """An empty dynamic layer with the sliding window of another layer."""
    if layer.is_sliding:
        return DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    return ReservedLayer(getattr(layer, "reserve_tokens", 0))


_ROWS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


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

    Raises:
        UnsupportedCacheError: A layer to change is of a kind that has no levels; nothing changes.
    """
    changes = _changes(cache, levels)
    if changes:
        _check_layers(cache, [number for number, _ in changes])
    for number, level in changes:
        while len(cache.layers) <= number:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[number]
        if not _has_tokens(layer):
            window = layer.sliding_window if layer.is_sliding else None
            cache.layers[number] = (
                native_layer(layer) if level.native else GroupedLayer(level, window)
            )
        elif isinstance(layer, GroupedLayer):
            cache.layers[number] = layer.lowered(level)
        else:
            rows = lengths
            if rows is None:
                rows = _lengths(cache, layer.keys.shape[0], layer.get_seq_length())
            if rows is not None:
                cache.layers[number] = GroupedLayer.of_native(level, layer, rows)


def check_levels(cache: Any, levels: Mapping[int, CacheLevel]) -> None:
    """Raise the error that `lower` would raise for a cache, without changing it."""
    changes = _changes(cache, levels)
    if changes:
        _check_layers(cache, [number for number, _ in changes])


def _changes(cache: Any, levels: Mapping[int, CacheLevel]) -> list[tuple[int, CacheLevel]]:
    """Layers that `lower` changes, with their new levels."""
    found: list[tuple[int, CacheLevel]] = []
    layers = getattr(cache, "layers", ())
    for number in range(max(len(layers), *(layer + 1 for layer in levels), 0)):
        layer = layers[number] if number < len(layers) else None
        level = levels.get(number, NATIVE_CACHE)
        held = layer.level if isinstance(layer, GroupedLayer) else NATIVE_CACHE
        if level is held or level == held:
            continue
        if layer is not None and _has_tokens(layer):
            if layer.keys.dtype == PLACEHOLDER_DTYPE:
                continue
            level = held.lowest(level)
        if level != held:
            found.append((number, level))
    return found


def lowest_levels(*caches: Any) -> dict[int, CacheLevel]:
    """For each layer the lowest of the levels at which caches hold it."""
    found: dict[int, CacheLevel] = {}
    for cache in caches:
        for number, layer in filled_layers(cache):
            if isinstance(layer, GroupedLayer):
                found[number] = layer.level.lowest(found.get(number, NATIVE_CACHE))
    return found


def raised(cache: Any, levels: Mapping[int, CacheLevel]) -> bool:
    """Whether a layer holds less than its level has, so that only a refill makes it exact."""
    return any(
        isinstance(layer, GroupedLayer) and layer.level != levels.get(number, NATIVE_CACHE)
        for number, layer in filled_layers(cache)
    )


def filled_layers(cache: Any) -> Iterator[tuple[int, Any]]:
    """Layers that hold anything, with their indices."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.dim() == 4:
            yield number, layer


def _has_tokens(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.get_seq_length() > 0


def _check_layers(cache: Any, numbers: Sequence[int]) -> None:
    """Reject a cache whose layers cannot be stored at a level."""
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

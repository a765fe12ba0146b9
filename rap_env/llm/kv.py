"""The KV cache of a model whose attention blocks come and go: transformers' own, layer by layer.

Shapes: B sequences, T tokens held, K key and value heads, D values in a head.

A removed attention block holds a uint8 place for each token, (B, 1, T, 1) (see `RemovedAttention`),
so that lengths and positions stay right for all other layers. What is missing from a cache is
therefore written in the cache itself, and it belongs to nobody's books.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from rap_env.errors import UnsupportedCacheError
from rap_env.llm.removed import PLACE_DTYPE, places

_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


def check_cache(cache: Any) -> None:
    """Refuse a cache whose layers cannot be let go of and filled again one by one.

    Raises:
        UnsupportedCacheError: Some layer is of another kind, or lies elsewhere than on the device.
    """
    layers = getattr(cache, "layers", None)
    kinds = sorted({type(layer).__name__ for layer in layers or () if type(layer) not in _KNOWN})
    if layers is None or kinds or getattr(cache, "offloading", False):
        seen = ", ".join(kinds) or ("offloaded layers" if layers is not None else "no layers")
        raise UnsupportedCacheError(
            f"The mask changed while a {type(cache).__name__} with {seen} was in use, and only "
            "dynamic and static caches, sliding or not, can follow; use one of those, or change "
            "masks between requests."
        )


def missing(cache: Any) -> frozenset[int]:
    """Layers of a cache in which a removed block left its places."""
    return frozenset(number for number, layer in _filled(cache) if layer.keys.dtype == PLACE_DTYPE)


def held_by(cache: Any, layers: AbstractSet[int]) -> list[int]:
    """Those of some layers of which a cache holds keys and values."""
    return [n for n, layer in _filled(cache) if n in layers and layer.keys.dtype != PLACE_DTYPE]


def let_go(cache: Any, layers: AbstractSet[int]) -> None:
    """Free keys and values of some layers, and leave places for their tokens.

    Raises:
        UnsupportedCacheError: As for `check_cache`; nothing changes.
    """
    going = held_by(cache, layers)
    if going:
        check_cache(cache)
    for number in going:
        layer = cache.layers[number]
        row = places(layer.keys.shape[0], layer.keys.shape[-2], layer.keys.device)
        layer.keys, layer.values = row, row.clone()


def empty(cache: Any) -> None:
    """Free everything that a cache holds; it can be filled anew.

    Raises:
        UnsupportedCacheError: As for `check_cache`; nothing changes.
    """
    check_cache(cache)
    for layer in cache.layers:
        layer.keys = layer.values = None
        layer.is_initialized = False
        for name in ("cumulative_length", "cumulative_length_int"):
            count = getattr(layer, name, None)
            if isinstance(count, torch.Tensor):
                count.zero_()
            elif count is not None:
                setattr(layer, name, 0)


def held_bytes(cache: Any) -> int:
    """Bytes that the tensors of a cache really keep from others: those of their storages."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for _, layer in _filled(cache)
        for storage in (layer.keys.untyped_storage(), layer.values.untyped_storage())
    }
    return sum(storages.values())


def _filled(cache: Any) -> Iterator[tuple[int, Any]]:
    """Layers that hold anything, with their numbers."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.dim() == 4:
            yield number, layer

"""The KV cache of a model whose attention blocks come and go: transformers' own, layer by layer.

Shapes: B sequences, T tokens held, K key and value heads, D values in a head.

A removed attention block holds a uint8 place for each token, (B, 1, T, 1) (see `RemovedAttention`),
so that lengths and positions stay right for all other layers. What is missing from a cache is
therefore written in the cache itself, and it belongs to nobody's books.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


class _Late:
    """The part that both kinds of late layers share: they began after `past` tokens.

    Such a layer holds keys and values of the tokens since then, and says the length that all other
    layers say. Its attention is shown the last columns of the mask alone (see `late_mask`).
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None

    @property
    def own_tokens(self) -> int:
        """Tokens that it holds."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows of other beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of `indices`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]


class LateLayer(_Late, DynamicLayer):  # type: ignore[no-untyped-call]
    """A growing cache layer that has not seen the first `past` tokens."""

    def __init__(self, past: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past = past

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, seen or not."""
        return self.past + self.own_tokens


class LateSlidingLayer(_Late, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same with a sliding window."""

    def __init__(self, past: int, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.cumulative_length = past


_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LateLayer,
    LateSlidingLayer,
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
        was = cache.layers[number]
        row = places(was.keys.shape[0], _tokens_to_keep(was), was.keys.device)
        cache.layers[number] = layer = _plain(was)
        if layer is not was:
            layer.lazy_initialization(row, row)
        layer.keys, layer.values = row, row.clone()


def begin_late(cache: Any, layers: Iterable[int]) -> None:
    """Let some layers, of which everything is missing, begin with the next token.

    Raises:
        UnsupportedCacheError: As for `check_cache`, or the cache is static: it has one length.
    """
    check_cache(cache)
    for number in layers:
        layer = cache.layers[number]
        if isinstance(layer, StaticLayer):
            raise UnsupportedCacheError(
                "A block cannot attend from here on with a static cache, whose layers all hold "
                "the same tokens; restore with 'refill' or 'next_request', or use a dynamic cache."
            )
        past = int(layer.get_seq_length())
        cache.layers[number] = (
            LateSlidingLayer(past, layer.sliding_window) if layer.is_sliding else LateLayer(past)
        )


def empty(cache: Any) -> None:
    """Free everything that a cache holds; it can be filled anew.

    Raises:
        UnsupportedCacheError: As for `check_cache`; nothing changes.
    """
    check_cache(cache)
    for number, layer in enumerate(cache.layers):
        cache.layers[number] = layer = _plain(layer)
        layer.keys = layer.values = None
        layer.is_initialized = False
        for name in ("cumulative_length", "cumulative_length_int"):
            count = getattr(layer, name, None)
            if isinstance(count, torch.Tensor):
                count.zero_()
            elif count is not None:
                setattr(layer, name, 0)


def late_mask(layer: Any, mask: Any, queries: int) -> Any:
    """The columns of an attention mask that a late layer will hold, (B, 1, queries, own tokens).

    Args:
        layer: The layer before its update.
        mask: The mask for all tokens, or None if a lone query sees them all.
        queries: Tokens that are about to be added.
    """
    if not isinstance(layer, _Late) or not isinstance(mask, torch.Tensor):
        return mask
    return mask[..., -(layer.own_tokens + queries) :]


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


def _tokens_to_keep(layer: Any) -> int:
    """Tokens for which a layer needs places: those that it holds, or a late one would hold."""
    if not isinstance(layer, _Late):
        return int(layer.keys.shape[-2])
    length = int(layer.get_seq_length())  # type: ignore[attr-defined]
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length  # type: ignore[attr-defined]


def _plain(layer: Any) -> Any:
    """The layer itself, or for a late one an empty layer of transformers' own, of its length."""
    if not isinstance(layer, _Late):
        return layer
    if not isinstance(layer, LateSlidingLayer):
        return DynamicLayer()  # type: ignore[no-untyped-call]
    plain = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    plain.cumulative_length = layer.cumulative_length
    return plain

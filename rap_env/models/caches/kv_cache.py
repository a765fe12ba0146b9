"""KV caches of a model whose plan changes: transformers' own caches, layer by layer.

Shapes: B sequences, T tokens cached, K key and value heads, D values in a head.

A plan changes between two steps (`ElasticLLM.apply`), and each cache in use follows: `apply`
immediately evicts the keys and values of a removed attention block, and quantises what is
above its level in place of the old (`lower`). A layer whose cache is below native is a
`GroupedLayer`; it is brought up to a higher level where what was lowered was copied to a file
(`BatchCache.copies`), else it stays as it is.

A restored block lacks the keys and values of the tokens so far, and a cache stays without
that layer. Keys and values that other layers computed under an older plan stay as they are. A
new cache, which `refill` computes from the same tokens, equals that of a model that ran with
the plan from the start, in every layer.

A removed attention block has a uint8 placeholder for each token in the cache, (B, 1, T, 1)
(see `RemovedAttention`), so that lengths and positions stay right for all other layers. The
cache itself therefore shows which layers are missing; no other record of it exists.

transformers' own layer copies all keys and values to new memory for each new token. The copies
take time, and the freed ones leave holes in the heap that no later, longer copy fits: with 450
tokens of the default model they took as much memory as the cache again. A `ReservedLayer` of a
service, which knows how long its rows can get, is allocated once.

Rows whose caches have different levels run in one pass too (`PartedCache`): weights are read once
for all rows, and attention runs once for the rows of each cache.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import CURRENT, ForwardPass
from rap_env.models.caches.tensor_file import NativeCopy, NewCopies, TensorFile, native_states
from rap_env.models.device import own_pages
from rap_env.models.families.placeholders import PLACEHOLDER_DTYPE, placeholder_entries


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


class PassInterruptedError(Exception):
    """A pass was told to end before its last layer; it has no result."""


class BatchCache(DynamicCache):
    """A dynamic cache; in an `interruptible` block its updates may end the pass.

    Args:
        config: The config of the model.
        copies: Folder of files with copies of what is lowered, for `read_back`; None
            for no copies.
        reserve_tokens: As for `ReservedLayer`, for layers without a sliding window.
    """

    def __init__(self, config: Any, copies: Path | None, reserve_tokens: int) -> None:
        super().__init__(config=config)
        self.layers = [
            ReservedLayer(reserve_tokens) if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]
        self.copies = copies
        self._interrupt: Callable[[], bool] | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        if self._interrupt is not None and self._interrupt():
            raise PassInterruptedError
        return super().update(*args, **kwargs)

    @contextmanager
    def interruptible(self, interrupt: Callable[[], bool]) -> Iterator[None]:
        """Let `interrupt`, which is called before each layer, end a pass in a ``with`` block.

        After a `PassInterruptedError` all layers have the tokens that they had before.
        """
        layers: list[Any] = self.layers
        undos = [_undo(layer) for layer in layers if layer.is_initialized]
        self._interrupt = interrupt
        try:
            yield
        except PassInterruptedError:
            for undo in undos:
                undo()
            raise
        finally:
            self._interrupt = None


def _undo(layer: Any) -> Callable[[], None]:
    """What takes tokens that are appended from now on off a layer again."""
    if isinstance(layer, GroupedLayer):
        return layer.undo()
    cached = layer.get_seq_length()
    # It loses its first tokens.
    window = (layer.keys, layer.values) if layer.is_sliding else None

    def undo() -> None:
        if window is None:
            layer.keys, layer.values = layer.keys[:, :, :cached], layer.values[:, :, :cached]
        else:
            layer.keys, layer.values = window
            layer.cumulative_length = cached

    return undo


@dataclass(frozen=True)
class Past:
    """The tokens from which a cache was computed.

    Attributes:
        tokens: (B, T).
        attention_mask: (B, T), 0 for padding.
        position_ids: (B, T).
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def missing(cache: Any) -> frozenset[int]:
    """Layers of a cache that hold placeholders of a removed block."""
    return frozenset(
        number for number, layer in filled_layers(cache) if layer.keys.dtype == PLACEHOLDER_DTYPE
    )


def check_same_blocks(cache: Any, removed: AbstractSet[int]) -> None:
    """Reject a cache that was filled while other attention blocks than these were removed.

    Args:
        cache: The cache, or None.
        removed: Layers whose attention block is removed now.
    """
    filled = {number for number, _ in filled_layers(cache)}
    if filled and missing(cache) != filled & removed:
        raise UnsupportedCacheError(
            "The cache was filled under a plan with other attention blocks than the present one; "
            "give all tokens and no cache, or apply that plan again."
        )


def evict(cache: Any, layers: AbstractSet[int]) -> None:
    """Put placeholders in for keys and values of some layers."""
    for number, layer in list(filled_layers(cache)):
        if number not in layers or layer.keys.dtype == PLACEHOLDER_DTYPE:
            continue
        if isinstance(layer, GroupedLayer):
            cache.layers[number] = placeholder_layer(
                layer, len(layer.lengths), layer.get_seq_length(), layer.device
            )
            continue
        row = placeholder_entries(layer.keys.shape[0], layer.keys.shape[-2], layer.keys.device)
        layer.keys, layer.values = row, row.clone()


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache occupies: those of the storages of its tensors."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for _, layer in filled_layers(cache)
        for tensor in tensors_of(layer)
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def placeholder_layer(layer: Any, batch: int, columns: int, device: torch.device) -> Any:
    """Placeholders for columns in place of a layer, in transformers' own kind of layer."""
    made = native_layer(layer)
    cached = columns
    if made.is_sliding:
        made.cumulative_length = columns
        cached = min(columns, made.sliding_window - 1)
    row = placeholder_entries(batch, cached, device)
    made.lazy_initialization(row, row)
    made.keys, made.values = row, row.clone()
    return made


def update_cache(llm: Any, cache: Any) -> None:
    """Update a cache to the model's plan, without computing anything."""
    evict(cache, llm.removed_attention)
    levels = {n: llm.plan.cache_level(n) for n in range(llm.adapter.num_layers)}
    lower(cache, levels)
    read_back(cache, levels)


def refill(llm: Any, cache: Any, past: Past, most_tokens: int) -> None:
    """Compute an empty cache under the model's plan, in chunks that bound the workspace.

    At most `most_tokens` tokens, of all sequences together, run at once.
    """
    batch, length = past.tokens.shape
    width = max(1, most_tokens // batch)
    decoder = llm.adapter.decoder(llm.model)
    name = cache_argument(decoder)
    for start in range(0, length, width):
        end = min(length, start + width)
        decoder(
            input_ids=past.tokens[:, start:end],
            attention_mask=past.attention_mask[:, :end],
            position_ids=past.position_ids[:, start:end],
            use_cache=True,
            **{name: cache},
        )


def cache_argument(module: torch.nn.Module) -> str:
    """The cache's argument name in this transformers version: ``cache`` or ``past_key_values``."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


_ROWS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _new_copies(cache: Any) -> NewCopies | None:
    folder = cache.copies if isinstance(cache, BatchCache) else None
    if folder is None:
        return None
    files = functools.cache(lambda rows: [TensorFile(folder) for _ in range(rows)])
    # Layers of a row share a file.
    return lambda rows: [NativeCopy(file) for file in files(rows)]


def note_rows(cache: Any, rows: torch.Tensor | Sequence[int] | None) -> None:
    """Remember the rows of a cache in use, for `lower`.

    Args:
        cache: The cache.
        rows: The padding mask of all its columns, the length of each row, or None for no
            padding.
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

    A layer that would be higher at its level in one respect (width or window) and lower in
    the other gets the lower of both. An empty layer gets its level. A removed block's stays
    as it is.

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
    layers = getattr(cache, "layers", ())
    new = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layers[number]) if number < len(layers) else new for number in numbers}
    wrong = sorted(getattr(kind, "__name__", "no layers") for kind in kinds - set(DYNAMIC_LAYERS))
    if wrong or getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            f"A {type(cache).__name__} with {', '.join(wrong) or 'offloaded layers'} cannot be "
            "quantised or windowed; use a DynamicCache, which is the default, or native caches."
        )


def _cached_tokens(layer: Any, length: int) -> int:
    """Tokens that a layer holds of sequences of `length` tokens."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def select_rows(layer: Any, length: int, rows: torch.Tensor, cut: int) -> None:
    """Select rows of a layer, and cut off padding on the left that they do not need."""
    if layer.keys is None:
        return
    if isinstance(layer, GroupedLayer):
        layer.select_rows(rows)
        layer.cumulative_length -= cut
        return
    cached = _cached_tokens(layer, length)
    room = reserved_tokens(layer)
    layer.keys = with_room([layer.keys[rows]], cached, room)
    layer.values = with_room([layer.values[rows]], cached, room)
    if layer.is_sliding:
        layer.cumulative_length -= cut


def append_rows(mine: Any, theirs: Any, length: int) -> None:
    """Append the rows of a layer, padded to `length` tokens, to another one of its level."""
    if isinstance(mine, GroupedLayer):
        mine.append_rows(theirs, length)
        return
    cached = _cached_tokens(mine, length)
    room = reserved_tokens(mine)
    mine.keys, theirs.keys = with_room([mine.keys, theirs.keys], cached, room), None
    mine.values, theirs.values = with_room([mine.values, theirs.values], cached, room), None
    if mine.is_sliding:
        mine.cumulative_length = length


@dataclass(frozen=True)
class _PassPart:
    """What a pass does with the rows of one part.

    Attributes:
        rows: The rows in the batch.
        cache: Their cache.
        step: Their tokens before and after the pass.
    """

    rows: slice
    cache: Any
    step: ForwardPass

    @property
    def sees_all(self) -> bool:
        """Whether each row has one new token, which sees all columns of its part."""
        return all(
            n == self.step.columns == m + 1
            for m, n in zip(self.step.before, self.step.after, strict=True)
        )


@dataclass(frozen=True)
class PartedKeys:
    """The keys and values of the parts after an update; stands for keys and for values.

    Attributes:
        parts: Each part with its keys and values as its own cache returns them.
    """

    parts: Sequence[tuple[_PassPart, Any, Any]]

    def attend(
        self,
        attention: Callable[..., tuple[torch.Tensor, Any]],
        module: Any,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of all rows, one part after another, (B, N, Q, D) -> (B, Q, N, D)."""
        outputs = []
        for part, keys, values in self.parts:
            own = None
            if mask is not None and isinstance(keys, torch.Tensor) and not part.sees_all:
                own = mask if len(mask) == 1 else mask[part.rows]
                own = own[..., -keys.shape[-2] :]  # columns of longer parts are on the left
            outputs.append(attention(module, query[part.rows], keys, values, own, **kwargs)[0])
        return torch.cat(outputs)


class PartedCache(DynamicCache):
    """The caches of several parts, as a model sees them in one pass: with all columns.

    Args:
        caches: The cache of each part.
        lengths: Tokens of each row of each part after the pass.
        new: Tokens of each row in the pass, padding included.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[list[int]], new: int) -> None:
        super().__init__()
        self.layers = max(caches, key=lambda cache: int(cache.get_seq_length())).layers
        self._parts, first = [], 0
        for cache, after in zip(caches, lengths, strict=True):
            step = ForwardPass([max(0, count - new) for count in after], after, max(after))
            self._parts.append(_PassPart(slice(first, first + len(after)), cache, step))
            first += len(after)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Add new columns, (B, K, Q, D) each, to each part; returns `PartedKeys` twice."""
        before, parts = CURRENT.step, []
        try:
            for part in self._parts:
                CURRENT.step = part.step
                states = key_states[part.rows], value_states[part.rows]
                parts.append((part, *part.cache.update(*states, layer_idx, *args, **kwargs)))
        finally:
            CURRENT.step = before
        keys = PartedKeys(parts)
        return keys, keys

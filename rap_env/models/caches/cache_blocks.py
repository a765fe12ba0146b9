"""KV caches outside of a batch: blocks of 32 tokens, cut from a row and put together again.

A block has the keys and values of up to 32 tokens in all layers, in memory of its own. Blocks
begin at multiples of 32 tokens, as stored groups do (`models.caches.grouped_cache`), so that
a group stays packed on its way into a block and back. Where a sequence is taken over up to a
token inside of a group, that group is unpacked into the unquantised tail.

Layers that know only the last tokens (those with a sliding window, and caches whose level has
a window) have no blocks: the last block of a sequence has them as they were after its last
token, and a sequence with such layers is taken over up to there or not at all.

Shapes: L layers with equal shapes, K key and value heads, G groups or blocks, T tokens of a
row, c tokens of a block, D channels of a head.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rap_env.levels import GROUP_TOKENS, NATIVE_CACHE, CacheLevel
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import Groups, pack, stored_groups, widen
from rap_env.models.caches.kv_cache import (
    ReservedLayer,
    filled_layers,
    missing,
    placeholder_layer,
    select_rows,
    tensors_of,
    with_room,
)
from rap_env.models.caches.tensor_file import TensorFile
from rap_env.models.device import own_pages
from rap_env.plan import Plan

_ALIGNED_BYTES = 64


@dataclass(frozen=True)
class LayerStack:
    """A block's keys and values in layers with equal shapes and widths.

    Attributes:
        layers: Numbers of the layers, (L,).
        bits: Bits of a value; 16 stands for unquantised ones.
        groups: As `pack` returns them for a group, (L, K, ...); unquantised ones (L, K, c, D).
    """

    layers: tuple[int, ...]
    bits: int
    groups: Groups

    def lowered(self, bits: int) -> LayerStack:
        """Unquantised values in fewer bits; fewer than 32 tokens are filled with the last one."""
        padded = []
        for states in self.groups:
            missing = GROUP_TOKENS - states.shape[2]
            last = states[:, :, -1:].expand(-1, -1, missing, -1)
            padded.append(torch.cat([states, last], dim=2)[:, :, None])
        packed = pack(bits, *padded)
        return LayerStack(self.layers, bits, tuple(tensor[:, :, 0] for tensor in packed))


@dataclass(frozen=True, eq=False)
class CacheBlock:
    """Keys and values of some tokens in all layers; see above.

    Attributes:
        stacks: Those of all tokens.
        ends: Layers that know only the last tokens, as they are after the block, by number.
        dtype: That of unquantised values.
        device: Where its tensors are, or would be.
        file: Where they are if they are not in memory, and where each of them begins there,
            with its shape and dtype.
    """

    stacks: tuple[LayerStack, ...]
    ends: Mapping[int, Any]
    dtype: torch.dtype
    device: torch.device
    file: tuple[TensorFile, list[tuple[int, torch.Size, torch.dtype]]] | None = None

    @cached_property
    def bytes(self) -> int:
        """Bytes in memory."""
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in self.tensors)}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def file_bytes(self) -> int:
        """Bytes in its file."""
        places = () if self.file is None else self.file[1]
        return sum(shape.numel() * dtype.itemsize for _, shape, dtype in places)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All its tensors."""
        for stack in self.stacks:
            yield from stack.groups
        for layer in self.ends.values():
            yield from tensors_of(layer)

    @cached_property
    def levels(self) -> Plan:
        """A plan whose levels of caches are those of the block."""
        lowered = [stack for stack in self.stacks if stack.bits < 16]
        caches = {n: CacheLevel(stack.bits) for stack in lowered for n in stack.layers}
        caches |= {n: end.level for n, end in self.ends.items() if isinstance(end, GroupedLayer)}
        return Plan(caches=tuple(caches.items()))

    def lowered_bytes(self, bits: Mapping[int, int]) -> int:
        """Bytes in memory once values have at most so many bits, by the number of the layer."""
        if self.file is not None:
            return 0
        freed = 0
        for stack in self.stacks:
            for target, layers in _by_bits(stack, bits).items():
                freed += max(0, len(layers) * self._saved_bytes(stack, target))
        return self.bytes - freed

    def lowered(self, bits: Mapping[int, int]) -> CacheBlock:
        """The block with at most so many bits a value, where that takes fewer bytes."""
        stacks = []
        for stack in self.stacks:
            for target, layers in _by_bits(stack, bits).items():
                index = [stack.layers.index(layer) for layer in layers]
                part = LayerStack(layers, stack.bits, tuple(t[index] for t in stack.groups))
                if self._saved_bytes(stack, target) > 0:
                    wide = widen(part.bits, part.groups, self.dtype)
                    part = LayerStack(layers, 16, wide).lowered(target)
                stacks.append(part)
        return CacheBlock(tuple(stacks), self.ends, self.dtype, self.device).in_own_pages()

    def _saved_bytes(self, stack: LayerStack, bits: int) -> int:
        """Bytes that a layer of a stack takes less with so many bits a value."""
        heads, _, size = stack.groups[0].shape[1:]
        own_bytes = sum(tensor.nbytes for tensor in stack.groups) // len(stack.layers)
        group_bytes = CacheLevel(bits).group_bytes(heads, size, self.dtype.itemsize)
        return own_bytes - group_bytes if bits < stack.bits else 0

    def in_own_pages(self) -> CacheBlock:
        """The block in memory that returns to the system once it is freed."""
        sizes = [-(-t.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for t in self.tensors]
        if self.device.type != "cpu":
            return self
        pages = own_pages(sum(sizes))
        begins = itertools.accumulate(sizes, initial=0)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            begin = next(begins)
            place = pages[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            return place.copy_(tensor)

        return self._with(moved)

    def in_file(self, file: TensorFile) -> CacheBlock:
        """The block in a file; raises `OSError` if that cannot be written."""
        places = [(file.append(t), t.shape, t.dtype) for t in self.tensors]
        file.sync()
        made = self._with(lambda tensor: tensor.new_empty(0))
        return CacheBlock(made.stacks, made.ends, self.dtype, self.device, (file, places))

    def in_memory(self) -> CacheBlock:
        """The block in memory; raises `OSError` if its file cannot be read."""
        if self.file is None:
            return self
        file, places = self.file
        unread = iter(places)
        return self._with(lambda _: file.read(*next(unread), self.device))

    def _with(self, made: Callable[[torch.Tensor], torch.Tensor]) -> CacheBlock:
        """The block with other tensors in place of its own."""
        stacks = tuple(
            LayerStack(stack.layers, stack.bits, tuple(map(made, stack.groups)))
            for stack in self.stacks
        )
        ends = {}
        for number, layer in self.ends.items():
            ends[number] = moved = copy.copy(layer)
            moved.keys, moved.values, *groups = map(made, tensors_of(layer))
            if isinstance(moved, GroupedLayer):
                moved.groups = tuple(groups)
        return CacheBlock(stacks, ends, self.dtype, self.device)

    def of_layer(self, number: int) -> tuple[int, Groups] | None:
        """Bits and tensors of one layer, (K, ...); None if the block lacks it.

        Raises:
            OSError: They are in a file that cannot be read.
        """
        first = 0
        for stack in self.stacks:
            if number in stack.layers:
                index = stack.layers.index(number)
                if self.file is None:
                    return stack.bits, tuple(tensor[index] for tensor in stack.groups)
                file, places = self.file
                own = places[first : first + len(stack.groups)]
                tensors = []
                for begin, shape, dtype in own:
                    part = torch.Size(shape[1:])
                    begin += index * part.numel() * dtype.itemsize
                    tensors.append(file.read(begin, part, dtype, self.device))
                return stack.bits, tuple(tensors)
            first += len(stack.groups)
        return None

    def end_of(self, number: int) -> Any:
        """A copy of a layer that knows only the last tokens, for a row."""
        return _row_of(self.ends[number], 0, 0, 0)


EMPTY_BLOCK = CacheBlock((), {}, torch.float32, torch.device("cpu"))
"""No token at all."""


def _by_bits(stack: LayerStack, bits: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """The layers of a stack by the bits that they have if none has more than `bits`."""
    layers: dict[int, tuple[int, ...]] = {}
    for layer in stack.layers:
        target = min(stack.bits, bits.get(layer, stack.bits))
        layers[target] = (*layers.get(target, ()), layer)
    return layers


def _row_of(layer: Any, row: int, length: int, padding: int) -> Any:
    """A copy of a layer with one row of `length` tokens, without room and copies in files."""
    made = copy.copy(layer)
    if isinstance(made, GroupedLayer):
        made.reserve_tokens = 0
    index = torch.tensor([row], device=layer.keys.device)
    select_rows(made, length or made.get_seq_length(), index, padding)
    if isinstance(made, GroupedLayer):
        made.copies = [None]
    return made


@dataclass(frozen=True)
class CachedRow:
    """A row of a cache, from which blocks are cut.

    Attributes:
        tokens: Its tokens.
        cache: The cache that it is in.
        row: Its number there.
        columns: Columns of the cache, padding included.
    """

    tokens: tuple[int, ...]
    cache: Any
    row: int
    columns: int

    @cached_property
    def absent(self) -> frozenset[int]:
        """Layers with placeholders of a removed block."""
        return missing(self.cache)

    @cached_property
    def _layers(self) -> list[tuple[int, Any]]:
        return [(n, layer) for n, layer in filled_layers(self.cache) if n not in self.absent]

    @cached_property
    def ending(self) -> frozenset[int]:
        """Layers that know only the last tokens."""
        return frozenset(
            number
            for number, layer in self._layers
            if layer.is_sliding
            or (isinstance(layer, GroupedLayer) and layer.level.window_tokens is not None)
        )

    def block(self, number: int) -> CacheBlock:
        """Block `number`, a copy; the last one has the layers that know only the last tokens."""
        length = len(self.tokens)
        first, end = number * GROUP_TOKENS, min(length, (number + 1) * GROUP_TOKENS)
        parts: dict[Any, list[tuple[int, Groups]]] = {}
        for n, layer in self._layers:
            if n in self.ending:
                continue
            if not isinstance(layer, GroupedLayer):
                at = self.columns - length
                bits, level = 16, 16
                tensors = tuple(
                    states[self.row, :, at + first : at + end]
                    for states in (layer.keys, layer.values)
                )
            elif number < stored_groups(length):
                bits = level = layer.level.bits
                tensors = tuple(groups[self.row, :, number] for groups in layer.groups)
            else:
                bits, level = 16, layer.level.bits if end - first == GROUP_TOKENS else 16
                tensors = tuple(
                    states[self.row, :, : end - first] for states in (layer.keys, layer.values)
                )
            shapes = tuple(tensor.shape for tensor in tensors)
            parts.setdefault((bits, level, shapes), []).append((n, tensors))
        stacks = []
        for (bits, level, _), layers in parts.items():
            numbers = tuple(n for n, _ in layers)
            stacked = map(torch.stack, zip(*(tensors for _, tensors in layers), strict=True))
            stack = LayerStack(numbers, bits, tuple(stacked))
            stacks.append(stack if level == bits else stack.lowered(level))
        ends = {}
        if end == length:
            padding = self.columns - length
            ends = {
                n: _row_of(e, self.row, length, padding)
                for n, e in self._layers
                if n in self.ending
            }
        keys = self._layers[0][1].keys if self._layers else torch.empty(0)
        return CacheBlock(tuple(stacks), ends, keys.dtype, keys.device).in_own_pages()


def fill(
    cache: Any,
    blocks: Sequence[CacheBlock],
    length: int,
    levels: Mapping[int, CacheLevel],
    removed: AbstractSet[int],
    reserve_tokens: int,
) -> None:
    """Fill an empty cache with a row of `length` tokens from the blocks of its beginning.

    Each layer gets its level at once; groups that have it already stay packed.

    Args:
        cache: The cache.
        blocks: Blocks 0, 1, ... of a sequence, of which the last one may be used in part.
        length: T.
        levels: Levels of layers; others are native.
        removed: Layers whose attention block is removed.
        reserve_tokens: As for `ReservedLayer`.

    Raises:
        OSError: A block is in a file that cannot be read.
    """
    last = blocks[-1].in_memory() if blocks[-1].ends else blocks[-1]
    for number, empty in enumerate(cache.layers):
        if number in removed:
            cache.layers[number] = placeholder_layer(empty, 1, length, last.device)
        elif number in last.ends:
            cache.layers[number] = last.end_of(number)
        else:
            parts = [part for block in blocks if (part := block.of_layer(number)) is not None]
            if parts:
                level = levels.get(number, NATIVE_CACHE)
                made = _layer_of(parts, length, level, last.dtype, reserve_tokens)
                cache.layers[number] = made


def _layer_of(
    parts: Sequence[tuple[int, Groups]],
    length: int,
    level: CacheLevel,
    dtype: torch.dtype,
    reserve_tokens: int,
) -> Any:
    """A layer with one row from its part of each block."""
    *body, (bits, tensors) = parts
    stored = len(body) * GROUP_TOKENS
    tail = tuple(
        states[None, :, : length - stored] for states in widen(bits, tensors, dtype)
    )  # (1, K, t, D)
    runs: list[tuple[int, Groups]] = []  # (1, K, G, ...)
    for width, run in itertools.groupby(body, key=lambda part: part[0]):
        groups = zip(*(tensors for _, tensors in run), strict=True)
        runs.append((width, tuple(torch.stack(same, dim=1)[None] for same in groups)))
    packed = level.bits < 16 and level.window_tokens is None
    if packed and {width for width, _ in runs} <= {level.bits}:
        made = GroupedLayer(level)
        made.lazy_initialization(*tail)
        if runs:
            made.groups = runs[0][1]
        made.keys[:, :, : length - stored], made.values[:, :, : length - stored] = tail
        made.lengths, made.cumulative_length = [length], length
        made.reserve_tokens = reserve_tokens
        return made
    wide = [widen(width, groups, dtype) for width, groups in runs]
    native = ReservedLayer(reserve_tokens)
    native.lazy_initialization(*tail)
    room = reserve_tokens if level.native else 0
    native.keys, native.values = (
        with_room(
            [torch.cat([*(each[i].flatten(2, 3) for each in wide), tail[i]], 2)], length, room
        )
        for i in range(2)
    )
    if level.native:
        return native
    made = GroupedLayer.of_native(level, native, [length])
    made.reserve_tokens = reserve_tokens
    return made

"""The residency of weights that the plan does not use.

=============  ==================================  ======================================
Residency      Weights that are not used           Loading them
=============  ==================================  ======================================
``resident``   stay in memory, at every level      moves nothing
               that was used so far
``offload``    CUDA: are in pinned host memory;    CUDA: one copy over the bus;
               CPU: stay in a safetensors file     CPU: one read of the file (mostly from
                                                   the system's page cache)
``drop``       are freed; no copy is kept          a read of the model's own files; other
                                                   levels are made from them again
=============  ==================================  ======================================

On a CPU the file is the model's own if it holds exactly these bytes, else one that is written
once to the cache folder. It is read into a buffer, not mapped: mapped pages would count as
memory of the process. Weights that are freed together are in a buffer of their own, whose
memory returns to the system as soon as it is freed; the C library's heap would keep it. All
other weights are copied to memory too: transformers may have left them mapped, and a mapping
keeps every page of the file that was read.

A level of a block's weights is made at its first use, and under ``offload`` written to a file
of its own with a checksum, which later processes verify before they use it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from rap_env.errors import (
    ArtifactError,
    ChecksumError,
    ModelNotAvailableError,
    UnsupportedModelError,
)
from rap_env.levels import WEIGHT_LEVELS, WeightLevel
from rap_env.models.device import own_pages
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.packing import PackedLevel
from rap_env.models.weights.tensors import (
    StoredTensor,
    bytes_of,
    not_readable,
    pieces_of,
    stored_tensors,
    untied_weights,
    verified_tensors,
    write_tensors,
)
from rap_env.models.weights.weight_levels import WeightItem, packed_level
from rap_env.paths import cache_dir

ALIGN_BYTES = 64
"""Best for vector instructions, and the alignment of torch's own allocator."""


def aligned(nbytes: int) -> int:
    """The bytes of a tensor in a buffer of several, with the gap to the next one."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True)
class _Part:
    name: str
    tensor: torch.Tensor
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class WeightGroup:
    """Tensors of one device that the same levels use: in a buffer of their own, or evicted.

    Args:
        tensors: Parameters or buffers of modules, by name; at least one.
        levels: The levels that use them.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], levels: Collection[WeightLevel]
    ) -> None:
        offset, parts = 0, []
        for name, tensor in tensors.items():
            parts.append(_Part(name, tensor, offset, tensor.shape, tensor.dtype))
            offset += aligned(tensor.nbytes)
        self.parts = parts
        self.levels = levels
        self.buffer_bytes = offset
        self.nbytes = sum(part.nbytes for part in parts)
        self.device = parts[0].tensor.device
        self.evicted = False
        self.host: torch.Tensor | None = None  # CUDA: the copy in pinned memory
        self.files: Sequence[StoredTensor] | None = None  # None: not looked for so far
        self._digest = b""  # of the weights, which never change; empty: not computed so far
        # Of the files when they held these weights.
        self._states: Sequence[tuple[int, ...]] = ()

    def pack(self) -> None:
        """Move the weights into a buffer of their own."""
        buffer = _buffer(self.buffer_bytes, self.device)
        for part in self.parts:
            part.view(buffer).copy_(part.tensor.data)
        self._point_to(buffer)

    def evict(self, *, pinned: bool) -> None:
        """Free the buffer, unless it is freed already; keep a copy in pinned memory if asked."""
        if self.evicted:
            return
        if pinned and self.host is None:  # the copy is kept: weights never change
            self.host = torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=True)
            # Nothing waits for it: the memory is reused, and the copy read, in the same
            # stream.
            first = self.parts[0].tensor.data  # in the buffer that `pack` or `load` made
            whole = torch.empty(0, dtype=torch.uint8, device=first.device)
            self.host.copy_(whole.set_(first.untyped_storage()), non_blocking=True)
        for part in self.parts:
            part.tensor.data = part.tensor.data.new_empty(0)
        self.evicted = True

    def store_in(self, known: Mapping[str, StoredTensor], *, trusted: bool = False) -> bool:
        """Load the weights, which are in memory now, from files after an eviction.

        Args:
            known: What is stored, by name, in any dtype.
            trusted: The files have the weights by definition, as those that were never read;
                only shapes are compared.

        Returns:
            Whether the files hold exactly these bytes; otherwise nothing changes.
        """
        files = [known[part.name].as_dtype(part.dtype) for part in self.parts if part.name in known]
        if [stored.shape for stored in files] != [part.shape for part in self.parts]:
            return False
        if not trusted:
            self._digest = self._digest or _digest(part.tensor.data for part in self.parts)
        try:
            if not trusted and _digest(pieces_of(files)) != self._digest:
                return False
        except (ChecksumError, ModelNotAvailableError):
            return False
        self.files, self._states = files, _states_of(files)
        return True

    def load(self) -> None:
        """Load the weights into a new buffer, unless they are in memory."""
        if not self.evicted:
            return
        buffer = _buffer(self.buffer_bytes, self.device)
        if self.host is not None:
            buffer.copy_(self.host, non_blocking=True)
        else:
            files = self.files or ()
            for part, stored in zip(self.parts, files, strict=True):
                stored.read_into(part.view(buffer))
            if (states := _states_of(files)) != self._states:
                if _digest(part.view(buffer) for part in self.parts) != self._digest:
                    raise _changed(files)
                self._states = states
        self._point_to(buffer)
        self.evicted = False

    def check(self) -> None:
        """Check that `load` will succeed: files that were changed are read, a piece at a time."""
        if self.host is not None or not self.files or _states_of(self.files) == self._states:
            return
        if _digest(pieces_of(self.files)) != self._digest:
            raise _changed(self.files)

    def _point_to(self, buffer: torch.Tensor) -> None:
        for part in self.parts:
            part.tensor.data = part.view(buffer)


def _digest(tensors: Iterable[torch.Tensor]) -> bytes:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(bytes_of(tensor.cpu()).numpy().data)
    return total.digest()


def _states_of(files: Iterable[StoredTensor]) -> list[tuple[int, ...]]:
    """What differs after a change of a file: device, inode, size and time of the last change."""
    try:
        stats = [path.stat() for path in sorted({stored.path for stored in files})]
    except OSError as error:
        raise not_readable(error) from error
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]


def _changed(files: Sequence[StoredTensor]) -> ChecksumError:
    return ChecksumError(
        f"{files[0].path} has other content than when the model was opened; put the model's own "
        "file back, or open the model again."
    )


def _buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return own_pages(nbytes, huge=True)  # filling those takes half the time


Residency = Literal["resident", "offload", "drop"]
"""Where weights are kept that the plan does not use."""

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)

log = logging.getLogger(__name__)

_LEVELS_VERSION = 1
"""Part of the names of files with levels: increase it when quantisers give other values."""


class WeightStore:
    """Evicts weights of single items and loads them again, bit for bit.

    Args:
        model: The model, without a removed block.
        items: The items: the blocks, and embeddings with head. Weights that are also used
            elsewhere (tied) always stay in memory.
        blocks: The modules of each block.
        folder: Folder of the model's own files, if it has any.
        residency: ``"offload"`` or ``"drop"``.
        fingerprint: Fingerprint of the model; names the files that have to be written, under
            ``"offload"``.
        as_stored: All weights were just read from the folder's files, each tensor into memory of
            its own (see `weight_files.load_native`): they are neither compared nor copied.
        unread: The tensors of all items are placeholders (see `weight_files.load_native`):
            they are evicted from the beginning. Blocks are read from the folder when a plan
            needs them; of native embeddings and head only some rows at a time are ever read.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[WeightItem],
        blocks: Iterable[Iterable[nn.Module]],
        folder: Path | None,
        residency: Residency,
        fingerprint: str,
        *,
        as_stored: bool = False,
        unread: bool = False,
    ) -> None:
        self.residency = residency
        own, others = untied_weights(model, blocks)
        embeddings = {
            name: tensor
            for place in items[-1].places
            if place.tied is None
            for name, tensor in place.weights.items()
        }
        ids = {id(tensor) for tensor in embeddings.values()}
        rest = {name: tensor for name, tensor in others.items() if id(tensor) not in ids}
        own.append(embeddings)
        weights = [tensor for tensors in (*own, rest) for tensor in tensors.values()]
        self._pinned = residency == "offload" and any(tensor.is_cuda for tensor in weights)
        self._written = cache_dir() / "offloaded" / fingerprint[:16]
        self._known = {} if folder is None else stored_tensors(folder)
        self._native = {
            item: _native_groups(item, tensors) for item, tensors in zip(items, own, strict=True)
        }
        self._made: dict[WeightItem, dict[PackedLevel, list[WeightGroup]]] = {i: {} for i in items}
        # Embeddings are rarely evicted: their files are found on demand.
        for item in items if unread else items[:-1]:
            self._find_files(item, trusted=unread or as_stored)
        if unread:
            for item in items[:-1]:
                self.release(item, "removed")
            self._read_by_rows(items[-1])
            return
        if not as_stored:
            groups = list(itertools.chain.from_iterable(self._native.values()))
            if rest:
                groups.append(WeightGroup(rest, ()))
            for group in groups:
                group.pack()
        for item in items:
            for level in item.made:
                self._add(item, level)

    def _read_by_rows(self, embeddings: WeightItem) -> None:
        """Evict embeddings and head for good, unless they are packed."""
        stored = self.stored()
        if not any(isinstance(place.original, PackedModule) for place in embeddings.places):
            for place in embeddings.places:
                module: Any = place.original
                kind = RowsOfEmbeddings if isinstance(module, nn.Embedding) else RowsOfHead
                place.native = kind(module, stored[id(module.weight)])
            self.release(embeddings, "removed")
            embeddings.put("native")

    def load_embeddings(self, embeddings: WeightItem) -> None:
        """Have native embeddings and head in memory, also if they are read by rows so far."""
        for place in embeddings.places:
            place.native = place.original
        self.load(embeddings, "native")
        embeddings.put("native")

    @property
    def added_bytes(self) -> int:
        """Bytes in memory of packed weights, less those of native weights that are evicted."""
        native = itertools.chain.from_iterable(self._native.values())
        made = itertools.chain.from_iterable(
            groups for levels in self._made.values() for groups in levels.values()
        )
        evicted_bytes = sum(group.nbytes for group in native if group.evicted)
        return sum(group.nbytes for group in made if not group.evicted) - evicted_bytes

    def holds(self, item: WeightItem, level: WeightLevel) -> bool:
        """Whether all weights that an item uses at a level are in memory."""
        made = level == "native" or level in self._made[item]
        return made and not any(group.evicted for group in self._used(item, level))

    def prepare(self, item: WeightItem, level: WeightLevel) -> None:
        """Make sure that an item can leave its level for another, and that this one exists.

        The first use of a level makes it; its weights are then in a file, and not in memory.
        Under ``drop`` there is no such file, and `load` makes them.
        """
        if level != "native":
            self._find_files(item)
        packed = packed_level(level)
        if packed is not None and packed not in self._made[item] and self.residency == "offload":
            self._make(item, packed)
            for group in self._made[item][packed]:
                group.evict(pinned=self._pinned)

    def check(self, item: WeightItem, level: WeightLevel) -> None:
        """Check that `load` will find the weights of a level, or those that it is made from."""
        try:
            for group in self._used(item, level):
                if group.evicted:
                    group.check()
        except (ChecksumError, ModelNotAvailableError):
            for group in self._native[item]:  # they may be in memory, but not when it loads
                group.check()

    def release(self, item: WeightItem, level: WeightLevel) -> None:
        """Free the weights of an item that a level does not use."""
        for group in self._groups_of(item):
            if level not in group.levels:
                group.evict(pinned=self._pinned)

    def load(self, item: WeightItem, level: WeightLevel) -> None:
        """Load the weights that an item uses at a level, unless they are in memory."""
        packed = packed_level(level)
        if packed is None and item.in_file:
            return
        if packed is not None:
            made = self._made[item].get(packed)
            if made is None or (self.residency == "drop" and any(g.evicted for g in made)):
                self._make(item, packed)
        try:
            for group in self._used(item, level):
                group.load()
        except (ChecksumError, ModelNotAvailableError) as error:
            if packed is None:
                raise
            log.debug("%s The level is created again.", error)
            self._make(item, packed)
            for group in self._used(item, level):
                group.load()

    def _used(self, item: WeightItem, level: WeightLevel) -> Iterator[WeightGroup]:
        return (group for group in self._groups_of(item) if level in group.levels)

    def _groups_of(self, item: WeightItem) -> Iterator[WeightGroup]:
        return itertools.chain(self._native[item], *self._made[item].values())

    def stored(self) -> dict[int, StoredTensor]:
        """The files of all native weights that were found in some, by the ids of the tensors."""
        groups = itertools.chain.from_iterable(self._native.values())
        pairs = (zip(group.parts, group.files or (), strict=False) for group in groups)
        return {id(part.tensor): stored for pair in pairs for part, stored in pair}

    def _find_files(self, item: WeightItem, *, trusted: bool = False) -> None:
        """Find the files from which an item's native weights can be read, or write them."""
        groups = [group for group in self._native[item] if group.files is None]
        if self._pinned or not groups:
            return
        known = dict(self._known)
        for place in item.places:
            if place.tied is not None:  # the file may have them under either name
                for name, other in zip(place.tied.weights, place.weights, strict=True):
                    if other in known:
                        known.setdefault(name, known[other])
        if all(group.store_in(known, trusted=trusted) for group in groups):
            return
        if self.residency == "drop":
            raise UnsupportedModelError(
                "residency='drop' reads weights again from the model's own safetensors "
                "files, and they are missing or hold other values than the model; save it "
                "with save_pretrained() and load it from that folder, or use 'offload'."
            )
        _store(groups, self._written / f"{item.name}.safetensors")

    def _make(self, item: WeightItem, level: PackedLevel) -> None:
        """Make a level of an item, from its file if there is one; the weights are in memory."""
        path, made_by_text = self._level_path(item, level), level in item.files
        in_file = self.residency == "offload" and not self._pinned and path.is_file()
        if made_by_text or in_file:
            try:
                item.build(level, verified_tensors(path))
                self._add(item, level, verified=True)
                return
            except (ChecksumError, ArtifactError) as error:
                if made_by_text:
                    raise
                log.warning("%s is damaged (%s); it is created again", path, error)
        groups = () if item.in_file else self._native[item]
        absent = [group for group in groups if group.evicted]
        try:
            for group in absent:
                group.load()
            item.quantise(level)
        finally:
            for group in absent:
                group.evict(pinned=self._pinned)
        self._add(item, level)

    def _add(self, item: WeightItem, level: PackedLevel, *, verified: bool = False) -> None:
        """Keep a level that was made; `verified` if it was just read from its file."""
        group, path = WeightGroup(item.tensors(level), (level,)), self._level_path(item, level)
        self._made[item][level] = [group]
        if self.residency == "offload" and not self._pinned:
            known = stored_tensors(path.parent, path.name) if verified else {}
            if not group.store_in(known, trusted=True):
                _store([group], path)
        elif not item.in_file:  # packing takes twice the memory
            group.pack()

    def _level_path(self, item: WeightItem, level: PackedLevel) -> Path:
        written = self._written / f"{item.name}.{level}-v{_LEVELS_VERSION}.safetensors"
        return item.files.get(level, written)


class RowsOfEmbeddings(nn.Module):
    """Embeddings whose rows are read from a file when they are looked up.

    Args:
        original: The embeddings, with any weights.
        weight: The rows (vocabulary, hidden).
    """

    def __init__(self, original: nn.Embedding, weight: StoredTensor) -> None:
        super().__init__()
        self.weight = weight
        self._original = [original]  # in a list: it is no submodule

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., hidden)."""
        ids, places = torch.unique(token_ids, return_inverse=True)
        rows = torch.cat([self.weight[i : i + 1] for i in ids.tolist()]).to(token_ids.device)
        few = copy.copy(self._original[0])  # its class may scale them
        few._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
        few.padding_idx = None
        looked_up: torch.Tensor = few(places)
        return looked_up


class RowsOfHead(nn.Module):
    """A head whose weights are read from a file at each call, some rows at a time.

    Args:
        original: The head, with any weights.
        weight: The rows (vocabulary, hidden).
    """

    def __init__(self, original: nn.Linear, weight: StoredTensor) -> None:
        super().__init__()
        self.weight = weight
        self.bias = original.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to (..., vocabulary)."""
        logits = states.new_empty(*states.shape[:-1], self.weight.shape[0])
        size = max(1, _ROW_VALUES // self.weight.shape[1])
        for first in range(0, logits.shape[-1], size):
            part = slice(first, first + size)
            rows = self.weight[part].to(states.device)
            bias = None if self.bias is None else self.bias[part]
            logits[..., part] = nn.functional.linear(states, rows, bias)
        return logits


_ROW_VALUES = 2**22


def _native_groups(item: WeightItem, weights: Mapping[str, torch.Tensor]) -> list[WeightGroup]:
    """The native weights of an item, a group for those that the same levels use."""
    every_level = frozenset(WEIGHT_LEVELS[:-1])
    users: dict[str, frozenset[WeightLevel]] = {
        name: frozenset(("native", *filter(place.keeps, item.levels)))
        for place in item.places
        for name in place.weights
    }
    by_levels: dict[frozenset[WeightLevel], dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        by_levels.setdefault(users.get(name, every_level), {})[name] = tensor
    return [WeightGroup(tensors, levels) for levels, tensors in by_levels.items()]


def _store(groups: Sequence[WeightGroup], path: Path) -> None:
    """Keep groups in a file, which is written unless it holds exactly their bytes."""
    with contextlib.suppress(ChecksumError, FileNotFoundError):
        known = stored_tensors(path.parent, path.name)
        if all(group.store_in(known) for group in groups):
            return
    write_tensors(path, {part.name: part.tensor.data for group in groups for part in group.parts})
    known = stored_tensors(path.parent, path.name)
    if not all(group.store_in(known) for group in groups):
        raise ChecksumError(f"{path} does not hold what was written to it; check the disk.")

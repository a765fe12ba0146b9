"""What becomes of a removed block's weights: they stay, they go where they cost nothing, or go.

=============  ==================================  ======================================
Residency      A removed block's weights           Putting the block back
=============  ==================================  ======================================
``resident``   stay in memory                      moves nothing
``offload``    CUDA: lie in pinned host memory;    CUDA: one copy over the bus;
               CPU: stay in a safetensors file     CPU: one read of the file (mostly from
                                                   the system's page cache)
``drop``       are gone; no copy is kept           a read of the model's own files
=============  ==================================  ======================================

On a CPU the file is the model's own where it holds exactly these bytes, else one that is written
once to the cache folder. It is read into place, not mapped: mapped pages would count as memory of
the process. Each block's weights lie in a buffer of their own, which the system takes back at once:
the C library's heap would keep it. All other weights move to memory too: transformers may have
left them mapped, and a mapping holds every page of the file that was ever read.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import nn

from rap_env.artifacts import atomic_write
from rap_env.errors import UnknownNameError, UnsupportedModelError
from rap_env.llm.fingerprint import named_weights, tensor_key
from rap_env.llm.stored import StoredTensor, stored_tensors
from rap_env.paths import cache_dir

Residency = Literal["resident", "offload", "drop"]
"""What becomes of the weights of removed blocks."""

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)

_ALIGN_BYTES = 64  # what vector instructions like best, and torch's own allocator gives


class HasModules(Protocol):
    """A block of a live model."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Its modules."""


def check_residency(name: str) -> None:
    """Refuse an unknown residency.

    Raises:
        UnknownNameError: There is no such residency.
    """
    if name not in RESIDENCIES:
        raise UnknownNameError("residency", name, RESIDENCIES)


@dataclass(frozen=True)
class _Part:
    """A parameter of a block and its place in the block's buffer."""

    name: str
    parameter: nn.Parameter
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class _Block:
    """The weights of one block: in a buffer of their own, or nowhere in memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        offset, parts = 0, []
        for name, parameter in parameters.items():
            parts.append(_Part(name, parameter, offset, parameter.shape, parameter.dtype))
            offset += -(-parameter.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.parts = parts
        self.buffer_bytes = offset
        self.nbytes = sum(part.nbytes for part in parts)
        self.device = device
        self.released = False
        self.host: torch.Tensor | None = None  # CUDA: the copy in pinned memory
        self.files: Sequence[StoredTensor] = ()

    def pack(self) -> None:
        """Move the weights into a buffer of their own."""
        self._point_to(self._copied_to(_buffer(self.buffer_bytes, self.device)))

    def pin(self) -> None:
        """Keep a copy in pinned host memory."""
        self.host = self._copied_to(
            torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=True)
        )

    def let_go(self) -> None:
        """Free the buffer."""
        for part in self.parts:
            part.parameter.data = part.parameter.data.new_empty(0)
        self.released = True

    def bring_back(self) -> None:
        """Fill a new buffer with what was let go.

        Raises:
            ChecksumError: A file is damaged.
            ModelNotAvailableError: A file is gone.
        """
        if self.host is not None:
            buffer = self.host.to(self.device, non_blocking=True)
        else:
            buffer = _buffer(self.buffer_bytes, self.device)
            for part, stored in zip(self.parts, self.files, strict=True):
                stored.read_into(part.view(buffer))
        self._point_to(buffer)
        self.released = False

    def among(self, known: Mapping[str, StoredTensor]) -> list[StoredTensor]:
        """Where the parameters are stored, as they are wanted; those that are not, left out."""
        return [known[part.name].wanted(part.dtype) for part in self.parts if part.name in known]

    def same_as(self, files: Sequence[StoredTensor]) -> bool:
        """Whether files hold exactly these bytes."""
        if len(files) != len(self.parts):
            return False
        cpu = torch.device("cpu")
        return all(
            stored.shape == part.shape
            and torch.equal(_bytes(stored.read(cpu)), _bytes(part.parameter.data.cpu()))
            for part, stored in zip(self.parts, files, strict=True)
        )

    def _copied_to(self, buffer: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            part.view(buffer).copy_(part.parameter.data)
        return buffer

    def _point_to(self, buffer: torch.Tensor) -> None:
        for part in self.parts:
            part.parameter.data = part.view(buffer)


class BlockWeights:
    """Lets the weights of single blocks go and brings them back, bit for bit.

    Args:
        parameters: Of each block, by their names in the model, (2L,); those that serve elsewhere
            too (tied) are left out, and stay.
        rest: All other parameters that share no memory with any.
        device: Where they lie.
        folder: The model's own files, if it has any.
        residency: ``"offload"`` or ``"drop"``.
        fingerprint: Of the model; files that have to be written are named by it.

    Raises:
        UnsupportedModelError: ``"drop"``, and the model's files do not hold these weights.
        StorageFullError: No room for a file to offload to.
    """

    def __init__(
        self,
        parameters: Sequence[Mapping[str, nn.Parameter]],
        rest: Mapping[str, nn.Parameter],
        device: torch.device,
        folder: Path | None,
        residency: Residency,
        fingerprint: str,
    ) -> None:
        self.residency = residency
        self._blocks = [_Block(own, device) for own in parameters]
        self._written = cache_dir() / "offloaded" / fingerprint[:16]
        known = {} if folder is None else stored_tensors(folder)
        for index, block in enumerate(self._blocks):
            self._prepare(index, block, known)
        for block in (*self._blocks, _Block(rest, device)):
            block.pack()

    @property
    def released_bytes(self) -> int:
        """Bytes of weights that are not in memory."""
        return sum(block.nbytes for block in self._blocks if block.released)

    def let_go(self, index: int) -> None:
        """Free the weights of a block, unless they are gone already."""
        block = self._blocks[index]
        if block.released or not block.parts:
            return
        if block.device.type == "cuda" and self.residency == "offload" and block.host is None:
            block.pin()  # kept from then on: weights are never written
        block.let_go()

    def bring_back(self, index: int) -> None:
        """Have the weights of a block in memory again.

        Raises:
            ChecksumError: A file is damaged.
            ModelNotAvailableError: A file is gone.
        """
        if self._blocks[index].released:
            self._blocks[index].bring_back()

    def _prepare(self, index: int, block: _Block, known: Mapping[str, StoredTensor]) -> None:
        """Find where the weights of a block can be read again, or write them there."""
        if block.device.type == "cuda" and self.residency == "offload":
            return
        files = block.among(known)
        if not block.same_as(files):
            if self.residency == "drop":
                raise UnsupportedModelError(
                    "residency='drop' needs the model's own safetensors files to read a block from "
                    "again, and they are not there or hold other values than the model; save it "
                    "with save_pretrained() and load it from that folder, or use 'offload'."
                )
            files = self._write(index, block)
        block.files = files

    def _write(self, index: int, block: _Block) -> list[StoredTensor]:
        """A file of the block's weights in the cache folder; one that is there serves again."""
        from safetensors.torch import save

        path = self._written / f"block{index:03d}.safetensors"
        files = block.among(stored_tensors(path.parent, path.name))
        if not block.same_as(files):
            with atomic_write(path) as file:
                file.write(save({p.name: p.parameter.data.contiguous() for p in block.parts}))
            files = block.among(stored_tensors(path.parent, path.name))
        return files


def untied_parameters(
    model: nn.Module, sites: Iterable[HasModules]
) -> tuple[list[dict[str, nn.Parameter]], dict[str, nn.Parameter]]:
    """Parameters that serve one block alone, (2L,), and all others, by names in the model.

    Those that share memory under several names are among the others if they are one object,
    and nowhere if they are several: moving one would part them.

    Args:
        model: The model, with every block in its place.
        sites: Its blocks, in order of index.
    """
    named = dict(model.named_parameters())  # one name for an object
    users = Counter(tensor_key(parameter) for parameter in named.values())
    alone = {n: p for n, p in named.items() if users[tensor_key(p)] == 1}
    seen = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    names = {id(parameter): name for name, parameter in alone.items()}
    blocks = []
    for site in sites:
        inside = [p for part in site.modules for p in part.parameters() if id(p) in names]
        blocks.append({names[id(p)]: p for p in inside if seen[tensor_key(p)] == 1})
    taken = {name for block in blocks for name in block}
    return blocks, {name: p for name, p in alone.items() if name not in taken}


def _buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory that goes back to the system as soon as no tensor uses it."""
    if device.type != "cpu" or nbytes == 0:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(_mapping(nbytes), dtype=torch.uint8)


def _mapping(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    # Private, in large pages where the system has them: it is filled in half the time.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

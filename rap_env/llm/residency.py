"""The residency of the weights of removed blocks.

=============  ==================================  ======================================
Residency      Weights of a removed block          Restoring the block
=============  ==================================  ======================================
``resident``   stay in memory                      moves nothing
``offload``    CUDA: are in pinned host memory;    CUDA: one copy over the bus;
               CPU: stay in a safetensors file     CPU: one read of the file (mostly from
                                                   the system's page cache)
``drop``       are freed; no copy is kept          a read of the model's own files
=============  ==================================  ======================================

On a CPU the file is the model's own if it holds exactly these bytes, else one that is written once
to the cache folder. It is read into a buffer, not mapped: mapped pages would count as memory of the
process. Each block's weights are in a buffer of their own, whose memory returns to the system as
soon as it is freed; the C library's heap would keep it. All other weights are copied to memory too:
transformers may have left them mapped, and a mapping keeps every page of the file that was read.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from rap_env.artifacts import atomic_write
from rap_env.errors import UnsupportedModelError
from rap_env.llm.weights import StoredTensor, stored_tensors
from rap_env.paths import cache_dir

Residency = Literal["resident", "offload", "drop"]
"""Where the weights of removed blocks are kept."""

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)

_ALIGN_BYTES = 64  # best for vector instructions, and the alignment of torch's own allocator


@dataclass(frozen=True)
class _Part:
    """A parameter of a block and its offset in the block's buffer."""

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
    """The weights of one block: in a buffer of their own, or evicted."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        offset, parts = 0, []
        for name, parameter in parameters.items():
            parts.append(_Part(name, parameter, offset, parameter.shape, parameter.dtype))
            offset += -(-parameter.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.parts = parts
        self.buffer_bytes = offset
        self.nbytes = sum(part.nbytes for part in parts)
        self.device = device
        self.evicted = False
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

    def evict(self) -> None:
        """Free the buffer."""
        for part in self.parts:
            part.parameter.data = part.parameter.data.new_empty(0)
        self.evicted = True

    def load(self) -> None:
        """Load the evicted weights into a new buffer."""
        if self.host is not None:
            buffer = self.host.to(self.device, non_blocking=True)
        else:
            buffer = _buffer(self.buffer_bytes, self.device)
            for part, stored in zip(self.parts, self.files, strict=True):
                stored.read_into(part.view(buffer))
        self._point_to(buffer)
        self.evicted = False

    def among(self, known: Mapping[str, StoredTensor]) -> list[StoredTensor]:
        """Storage of the parameters in their dtype; parameters that are not stored are left out."""
        return [known[part.name].as_dtype(part.dtype) for part in self.parts if part.name in known]

    def same_as(self, files: Sequence[StoredTensor]) -> bool:
        """Whether files contain exactly these bytes."""
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
    """Evicts the weights of single blocks and loads them again, bit for bit.

    Args:
        parameters: Parameters of each block by their names in the model, (2L,), without those
            that are also used elsewhere (tied), which always stay in memory.
        rest: All other parameters that share no memory with any.
        device: Device of the parameters.
        folder: Folder of the model's own files, if it has any.
        residency: ``"offload"`` or ``"drop"``.
        fingerprint: Fingerprint of the model; names the files that have to be written.

    Raises:
        UnsupportedModelError: ``"drop"``, and the model's files do not contain these weights.
        StorageFullError: No disk space for a file to offload to.
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
    def evicted_bytes(self) -> int:
        """Bytes of weights that are not in memory."""
        return sum(block.nbytes for block in self._blocks if block.evicted)

    def evict(self, index: int) -> None:
        """Free the weights of a block, unless they are freed already."""
        block = self._blocks[index]
        if block.evicted or not block.parts:
            return
        if block.device.type == "cuda" and self.residency == "offload" and block.host is None:
            block.pin()  # the copy is kept: weights never change
        block.evict()

    def load(self, index: int) -> None:
        """Load the weights of a block into memory, unless they are there."""
        if self._blocks[index].evicted:
            self._blocks[index].load()

    def _prepare(self, index: int, block: _Block, known: Mapping[str, StoredTensor]) -> None:
        """Find the files from which the weights of a block can be read, or write them."""
        if block.device.type == "cuda" and self.residency == "offload":
            return
        files = block.among(known)
        if not block.same_as(files):
            if self.residency == "drop":
                raise UnsupportedModelError(
                    "residency='drop' reads removed blocks again from the model's own safetensors "
                    "files, and they are missing or hold other values than the model; save it "
                    "with save_pretrained() and load it from that folder, or use 'offload'."
                )
            files = self._write(index, block)
        block.files = files

    def _write(self, index: int, block: _Block) -> list[StoredTensor]:
        """Write the block's weights to the cache folder, unless a file there holds them already."""
        from safetensors.torch import save

        path = self._written / f"block{index:03d}.safetensors"
        files = block.among(stored_tensors(path.parent, path.name))
        if not block.same_as(files):
            with atomic_write(path) as file:
                file.write(save({p.name: p.parameter.data.contiguous() for p in block.parts}))
            files = block.among(stored_tensors(path.parent, path.name))
        return files


def _buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory that returns to the system as soon as no tensor uses it."""
    if device.type != "cpu" or nbytes == 0:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(_mapping(nbytes), dtype=torch.uint8)


def _mapping(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    # Private, in huge pages where the system has them: filling it takes half the time.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

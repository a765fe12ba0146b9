"""Weights that are kept in memory, or evicted and loaded again, together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.levels import WeightLevel
from rap_env.models.device import own_pages
from rap_env.models.weights.tensors import StoredTensor, not_readable

ALIGN_BYTES = 64
"""Best for vector instructions, and the alignment of torch's own allocator."""

_LEAST_CHUNK, _MOST_CHUNK = 2**16, 2**26  # bytes
_CHUNKS = 16  # of a model, roughly


class PinnedMemory:
    """Page-locked memory of the host, which CUDA devices copy to and from without waiting.

    torch rounds each pinned allocation up to a power of two. It is therefore taken in chunks of
    such a size, and given out in pieces that fill one chunk after the other; all of it is in use,
    except the end of the last chunk. It is freed with the last tensor in it.

    Args:
        expected_bytes: Bytes that will be taken, roughly.
    """

    def __init__(self, expected_bytes: int) -> None:
        size = 1 << (expected_bytes // _CHUNKS).bit_length()
        self.chunk_bytes = min(max(size, _LEAST_CHUNK), _MOST_CHUNK)
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> list[torch.Tensor]:
        """Memory for `nbytes` in one or more pieces, uint8."""
        pieces = []
        while nbytes:
            if not len(self._left):
                self._left = torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=True)
            pieces.append(self._left[:nbytes])
            self._left = self._left[nbytes:]
            nbytes -= len(pieces[-1])
        return pieces


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
        self.host: list[torch.Tensor] = []  # CUDA: the copy in pinned memory, in pieces
        self.files: Sequence[StoredTensor] | None = None  # None: not looked for so far
        self._digest = b""  # of the weights
        self._states: Sequence[tuple[int, ...]] = ()  # of the files when they held these weights

    def pack(self) -> None:
        """Move the weights into a buffer of their own."""
        self._point_to(self._copied_to(_buffer(self.buffer_bytes, self.device)))

    def evict(self, pinned: PinnedMemory | None) -> None:
        """Free the buffer, unless it is freed already; keep a copy in pinned memory, if given."""
        if self.evicted:
            return
        if pinned is not None and not self.host:  # the copy is kept: weights never change
            self.host = pinned.take(self.buffer_bytes)
            # Nothing waits for it: the memory is reused, and the copy read, in the same stream.
            for here, piece in self._pieces(self._packed()):
                piece.copy_(here, non_blocking=True)
        for part in self.parts:
            part.tensor.data = part.tensor.data.new_empty(0)
        self.evicted = True

    def store_in(self, files: Sequence[StoredTensor]) -> None:
        """Load the weights, which are in memory now, from these files after an eviction."""
        self.files = files
        self._states = _states_of(files)
        self._digest = _digest(part.tensor.data for part in self.parts)

    def load(self) -> None:
        """Load the weights into a new buffer, unless they are in memory."""
        if not self.evicted:
            return
        buffer = _buffer(self.buffer_bytes, self.device)
        if self.host:
            for there, piece in self._pieces(buffer):
                there.copy_(piece, non_blocking=True)
        else:
            for part, stored in zip(self.parts, self.files or (), strict=True):
                stored.read_into(part.view(buffer))
            self._accept(part.view(buffer) for part in self.parts)
        self._point_to(buffer)
        self.evicted = False

    def verify(self) -> None:
        """Read the files of evicted weights, a piece at a time; errors as for `load`."""
        if self.evicted:
            self._verify()

    def _verify(self) -> None:
        files = self.files
        if not self.host and files is not None:
            cpu = torch.device("cpu")
            pieces = (piece.read(cpu) for stored in files for piece in stored.pieces())
            if _digest(pieces) != self._digest:
                raise _changed(files)

    def check(self) -> None:
        """As `verify`, as if the weights were evicted; unchanged files are not read."""
        if not self.host and self.files is not None and _states_of(self.files) != self._states:
            self._verify()

    def _accept(self, found: Iterable[torch.Tensor]) -> None:
        """Raise `ChecksumError` if the files have changed, and what was read with them."""
        files = self.files or ()
        states = _states_of(files)
        if states == self._states:
            return
        if _digest(found) != self._digest:
            raise _changed(files)
        self._states = states

    def among(self, known: Mapping[str, StoredTensor]) -> list[StoredTensor]:
        """Storage of the tensors in their dtype; those that are not stored are left out."""
        return [known[part.name].as_dtype(part.dtype) for part in self.parts if part.name in known]

    def same_as(self, files: Sequence[StoredTensor]) -> bool:
        """Whether files contain exactly these bytes."""
        if len(files) != len(self.parts):
            return False
        cpu = torch.device("cpu")
        try:
            return all(
                stored.shape == part.shape
                and torch.equal(bytes_of(stored.read(cpu)), bytes_of(part.tensor.data.cpu()))
                for part, stored in zip(self.parts, files, strict=True)
            )
        except (ChecksumError, ModelNotAvailableError):
            return False

    def _packed(self) -> torch.Tensor:
        """The buffer that `pack` or `load` made, whole, (bytes,)."""
        first = self.parts[0].tensor.data
        return torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())

    def _pieces(self, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The parts of a buffer, each with the piece of the copy on the host."""
        return zip(torch.split(buffer, [len(piece) for piece in self.host]), self.host, strict=True)

    def _copied_to(self, buffer: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            part.view(buffer).copy_(part.tensor.data)
        return buffer

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


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().view(-1).view(torch.uint8)

"""Weights that are kept in memory, or evicted and loaded again, together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.levels import WeightLevel
from rap_env.models.device import own_pages
from rap_env.models.weights.tensors import StoredTensor, bytes_of, not_readable, pieces_of

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
            self.host.copy_(self._packed(), non_blocking=True)
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

    def _packed(self) -> torch.Tensor:
        """The buffer that `pack` or `load` made, whole, (bytes,)."""
        first = self.parts[0].tensor.data
        return torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())

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

"""Tensors in files without names, whose bytes do not count as used memory.

Shapes: B sequences (rows), K key and value heads, T columns, G groups of 32 tokens, D
channels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rap_env.levels import GROUP_TOKENS
from rap_env.models.device import own_pages

log = logging.getLogger(__name__)

_SYNC_BYTES = 2 * 2**20
"""Written pages count as used memory of a control group until they are on the disk."""


class TensorFile:
    """A file without a name, which ends with this object.

    Args:
        folder: Where the file is made.

    Attributes:
        failed: Whether something could not be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = self._synced = 0
        self.failed = False

    @functools.cached_property
    def _number(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  ends with this
        return self._file.fileno()

    @property
    def bytes(self) -> int:
        """Bytes that were written."""
        return self._end

    def append(self, tensor: torch.Tensor) -> int:
        """Write a tensor; returns where it begins. Raises `OSError` if that fails."""
        begin, failed, self.failed = self._end, self.failed, True
        data: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        while len(data):
            count = os.pwrite(self._number, data, self._end)
            data, self._end = data[count:], self._end + count
        if self._end - self._synced >= _SYNC_BYTES:
            self.sync()
        self.failed = failed
        return begin

    def sync(self) -> None:
        """Bring what is written to the disk, and let its pages go."""
        with contextlib.suppress(AttributeError):  # Linux only
            os.fdatasync(self._number)
            os.posix_fadvise(self._number, 0, 0, os.POSIX_FADV_DONTNEED)
        self._synced = self._end

    def read(
        self, begin: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor that was written at `begin`. Raises `OSError` if it is not there."""
        tensor = own_pages(shape.numel() * dtype.itemsize)
        data: Any = tensor.numpy()
        while len(data):
            count = os.preadv(self._number, [data], begin)
            if not count:
                raise OSError("the file is shorter than what was written")
            data, begin = data[count:], begin + count
        return tensor.view(dtype).view(shape).to(device)


class NativeCopy:
    """Native keys and values of a row's finished groups in one layer, for when memory is back.

    What cannot be written is not copied: a row without a whole copy is computed again.

    Args:
        file: The file of the row.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._pieces: list[tuple[int, int, int]] = []  # groups from, to; where

    def write(self, first: int, states: torch.Tensor) -> None:
        """Copy keys and values of groups from `first` on, (2, K, G, 32, D), in place of older."""
        if self._file.failed:
            return
        try:
            begin = self._file.append(states)
        except OSError as error:
            log.warning("A lowered cache cannot be copied, but computed again: %s.", error)
            return
        self._pieces.append((first, first + states.shape[2], begin))

    def read(self, groups: int, like: torch.Tensor) -> torch.Tensor | None:
        """The first groups, (2, K, 32 G, D), with the dtype of `like`; None if some are missing."""
        if self._file.failed:
            return None
        heads, _, size = like.shape
        states, missing = like.new_empty((2, heads, groups, GROUP_TOKENS, size)), set(range(groups))
        for first, end, begin in self._pieces:
            shape = torch.Size((2, heads, end - first, GROUP_TOKENS, size))
            try:
                piece = self._file.read(begin, shape, like.dtype, like.device)
            except OSError as error:
                log.warning("A copied cache cannot be read, but computed again: %s.", error)
                return None
            states[:, :, first:end] = piece[:, :, : max(0, groups - first)]
            missing -= set(range(first, end))
        return None if missing else states.flatten(2, 3)


NewCopies = Callable[[int], Sequence[NativeCopy]]
"""Makes copies for so many rows of a layer."""


def native_states(layer: Any) -> torch.Tensor | None:
    """All keys and values of a `GroupedLayer`, from copies, padded on the left, (2, B, K, T, D).

    None if a row has no whole copy.
    """
    columns = layer.get_seq_length()
    tails = torch.stack([layer.keys, layer.values])
    states = tails.new_zeros((*tails.shape[:3], columns, tails.shape[-1]))
    for row, (length, copy) in enumerate(zip(layer.lengths, layer.copies, strict=True)):
        groups = max(0, length - 1) // GROUP_TOKENS
        copied = None if copy is None else copy.read(groups, layer.keys[row])
        if copied is None:
            return None
        first, done = columns - length, groups * GROUP_TOKENS
        states[:, row, :, first : first + done] = copied
        states[:, row, :, first + done :] = tails[:, row, :, : length - done]
    return states

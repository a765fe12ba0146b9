"""A KV cache whose tensors are in a file without a name until they are needed again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.layers import filled_layers
from rap_env.models.device import own_pages


class StoredCache:
    """Moves a cache to a file, one tensor at a time.

    Args:
        cache: Its layers are empty afterwards, and become full again by `load`.
        folder: Where the file is made. It has no name, and ends with this object.

    Raises:
        OSError: The file cannot be written; the cache is as before.
    """

    def __init__(self, cache: Any, folder: Path) -> None:
        self._cache = cache
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  ends with this
        tensors = [tensor for _, layer in filled_layers(cache) for tensor in _tensors(layer)]
        try:
            self._likes = [self._write(tensor) for tensor in tensors]
            # Written pages count as used memory of a control group until they are on the disk.
            os.fdatasync(self._file.fileno())
            with contextlib.suppress(AttributeError):  # Linux only
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._file.close()
            raise
        self._layers = [layer for _, layer in filled_layers(cache)]
        for layer in self._layers:
            _set_tensors(layer, [tensor.new_empty(0) for tensor in _tensors(layer)])

    def load(self) -> Any:
        """The cache with its tensors.

        Raises:
            OSError: The file cannot be read.
        """
        self._file.seek(0)
        likes = iter(self._likes)
        for layer in self._layers:
            _set_tensors(layer, [self._read(*next(likes)) for _ in _tensors(layer)])
        self._file.close()
        return self._cache

    def _write(self, tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        data: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        while len(data):
            data = data[self._file.write(data) :]
        return tensor.shape, tensor.dtype, tensor.device

    def _read(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = own_pages(shape.numel() * dtype.itemsize)
        data: Any = tensor.numpy()
        while len(data):
            count = os.readv(self._file.fileno(), [data])
            if not count:
                raise OSError("the file is shorter than what was written")
            data = data[count:]
        return tensor.view(dtype).view(shape).to(device)


def _tensors(layer: Any) -> tuple[torch.Tensor, ...]:
    return layer.tensors if isinstance(layer, GroupedLayer) else (layer.keys, layer.values)


def _set_tensors(layer: Any, tensors: list[torch.Tensor]) -> None:
    layer.keys, layer.values, *groups = tensors
    if isinstance(layer, GroupedLayer):
        layer.groups = tuple(groups)

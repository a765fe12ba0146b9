"""A KV cache whose tensors are in a file without a name until they are needed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.layers import filled_layers
from rap_env.models.caches.tensor_file import TensorFile


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
        self._file = TensorFile(folder)
        tensors = [tensor for _, layer in filled_layers(cache) for tensor in _tensors(layer)]
        self._likes = [
            (self._file.append(tensor), tensor.shape, tensor.dtype, tensor.device)
            for tensor in tensors
        ]
        self._file.sync()
        self._layers = [layer for _, layer in filled_layers(cache)]
        for layer in self._layers:
            _set_tensors(layer, [tensor.new_empty(0) for tensor in _tensors(layer)])

    def load(self) -> Any:
        """The cache with its tensors.

        Raises:
            OSError: The file cannot be read.
        """
        likes = iter(self._likes)
        for layer in self._layers:
            _set_tensors(layer, [self._file.read(*next(likes)) for _ in _tensors(layer)])
        return self._cache


def _tensors(layer: Any) -> tuple[torch.Tensor, ...]:
    return layer.tensors if isinstance(layer, GroupedLayer) else (layer.keys, layer.values)


def _set_tensors(layer: Any, tensors: list[torch.Tensor]) -> None:
    layer.keys, layer.values, *groups = tensors
    if isinstance(layer, GroupedLayer):
        layer.groups = tuple(groups)

"""The KV cache of rows of a batch: passes may end between two layers, and lowered layers be copied.

A pass over hundreds of tokens takes seconds on a slow CPU. Attention updates the cache once in each
layer, so the cache is where such a pass can end, in a model of any family and without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from rap_env.models.caches.grouped_cache import GroupedLayer


class PassInterruptedError(Exception):
    """A pass was told to end before its last layer; it has no result."""


class BatchCache(DynamicCache):
    """A dynamic cache; in an `interruptible` block its updates may end the pass.

    Args:
        config: The config of the model.
        copies: Folder of files with copies of what is lowered, for `caches.layers.read_back`; None
            for no copies.
    """

    def __init__(self, config: Any, copies: Path | None) -> None:
        super().__init__(config=config)
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
    window = (layer.keys, layer.values) if layer.is_sliding else None  # it loses its first tokens

    def undo() -> None:
        if window is None:
            layer.keys, layer.values = layer.keys[:, :, :cached], layer.values[:, :, :cached]
        else:
            layer.keys, layer.values = window
            layer.cumulative_length = cached

    return undo

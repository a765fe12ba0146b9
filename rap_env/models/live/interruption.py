"""Passes that end between two layers, and what they leave in the KV cache.

A pass over hundreds of tokens takes seconds on a slow CPU. Attention updates the cache once in each
layer, so the cache is where such a pass can end, in a model of any family and without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import DynamicCache

from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.layers import DYNAMIC_LAYERS


class PassInterruptedError(Exception):
    """A pass was told to end before its last layer; it has no result."""


class InterruptibleCache(DynamicCache):
    """A dynamic cache; in an `interruptible` block its updates may end the pass."""

    _interrupt: Callable[[], bool] | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        if self._interrupt is not None and self._interrupt():
            raise PassInterruptedError
        return super().update(*args, **kwargs)

    @contextmanager
    def interruptible(self, interrupt: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
        """Let `interrupt`, which is called before each layer, end a pass in a ``with`` block.

        Yields:
            Brings all layers back to the tokens that they had before; returns whether it could.
            Layers that forget tokens, as with a window, cannot be brought back once updated.
        """
        layers: list[Any] = self.layers
        before = [(layer, layer.get_seq_length(), _undo(layer)) for layer in layers]

        def restore() -> bool:
            changed = [undo for layer, cached, undo in before if layer.get_seq_length() != cached]
            if None in changed:
                return False
            for undo in changed:
                undo()
            return True

        self._interrupt = interrupt
        try:
            yield restore
        finally:
            self._interrupt = None


def _undo(layer: Any) -> Any:
    """What takes tokens that are appended from now on off a layer again; None if nothing can."""
    if isinstance(layer, GroupedLayer):
        return layer.undo()
    if layer.is_sliding or type(layer) not in DYNAMIC_LAYERS or not layer.is_initialized:
        return None
    cached = layer.get_seq_length()

    def undo() -> None:
        layer.keys, layer.values = layer.keys[:, :, :cached], layer.values[:, :, :cached]

    return undo

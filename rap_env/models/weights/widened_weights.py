"""Keeps the widened weights of packed modules while many rows run through them, as in scoring."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from rap_env.models.weights.packed_modules import PackedEmbedding, PackedModule

WIDENED_BYTES = 512 * 2**20
"""Most bytes of widened weights that the scorers of one model keep; the head's may exceed them."""


class WidenedWeights:
    """Widens the weights of packed modules once, and computes with them in a ``with`` block.

    Scores must not depend on how much memory there is. So a module whose widened weights are not
    kept is widened for each call, and its own kernels are not used in the ``with`` block.

    Args:
        max_bytes: Most bytes of widened weights that are kept, besides heads. The first ones are
            kept: modules run in turn, so replacing the oldest would free each before its next use.
    """

    def __init__(self, max_bytes: int = WIDENED_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: weakref.WeakKeyDictionary[PackedModule, nn.Module] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> WidenedWeights:
        """The widened weights of a model, which all that use it at the same time share."""
        weights = _shared.get(id(model))
        if weights is None:
            weights = _shared[id(model)] = cls()
        return weights

    @property
    def held_bytes(self) -> int:
        """Bytes of the widened weights that are kept."""
        return sum(map(_weight_bytes, list(self._kept.values())))

    @contextlib.contextmanager
    def used_in(self, module: nn.Module) -> Iterator[None]:
        """Compute with widened weights in a module, such as a layer or a decoder."""
        packed = [
            part
            for part in module.modules()
            if isinstance(part, PackedModule) and not isinstance(part, PackedEmbedding)
        ]
        try:
            for part in packed:
                part.__dict__["forward"] = partial(self._run, part)
            yield
        finally:
            for part in packed:
                part.__dict__.pop("forward", None)

    def linear(self, module: nn.Module) -> nn.Module:
        """The head itself, or if it is packed, an unquantised one with the same weights; kept."""
        if not isinstance(module, PackedModule):
            return module
        if module not in self._kept:
            self._kept[module] = module.widened()
        return self._kept[module]

    def clear(self) -> None:
        """Free all kept weights."""
        self._kept.clear()

    def _run(self, module: PackedModule, *args: Any, **kwargs: Any) -> Any:
        return self._wide(module)(*args, **kwargs)

    def _wide(self, module: PackedModule) -> nn.Module:
        if module in self._kept:
            return self._kept[module]
        wide = module.widened()
        if self.held_bytes + _weight_bytes(wide) <= self.max_bytes:
            self._kept[module] = wide
        return wide


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


_shared: weakref.WeakValueDictionary[int, WidenedWeights] = weakref.WeakValueDictionary()

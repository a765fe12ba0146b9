"""Where the blocks of a live model are, and what stands in their places now."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from rap_env.blocks import BlockMask
from rap_env.llm.removed import Removed
from rap_env.llm.residency import BlockWeights
from rap_env.llm.stub import Stub


@dataclass(frozen=True)
class Slot:
    """One attribute of a layer that holds a part of a block.

    Modules are swapped in the parent's table of modules itself. ``setattr`` ends there too, after
    looking for a parameter, a buffer or a plain attribute of that name; there is none, since
    `original` was found in the table, and a mask may change between any two tokens.

    Attributes:
        parent: The module that has the attribute.
        attribute: Its name.
        original: The module that belongs there.
        stand_in: What takes its place while the block is removed.
    """

    parent: nn.Module
    attribute: str
    original: nn.Module
    stand_in: nn.Module

    def remove(self) -> None:
        """Put the stand-in there."""
        self.parent._modules[self.attribute] = self.stand_in

    def restore(self) -> None:
        """Put the original back."""
        self.parent._modules[self.attribute] = self.original


@dataclass(frozen=True)
class BlockSite:
    """All slots of one block: its modules, and the norms that it alone uses.

    Attributes:
        index: Index of the block.
        slots: The slots; the first one holds the attention or the last feed-forward module.
    """

    index: int
    slots: tuple[Slot, ...]

    @property
    def gone(self) -> bool:
        """Whether the model was built without the block, so that there is nothing to restore."""
        return isinstance(self.slots[0].original, Removed)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The block's own modules."""
        return tuple(slot.original for slot in self.slots)

    def remove(self, stub: nn.Module | None = None) -> None:
        """Take the block out of its layer, and let a stub stand there, if one is given."""
        cast("Removed", self.slots[0].stand_in).stub = stub
        for slot in self.slots:
            slot.remove()

    def restore(self) -> None:
        """Put the block back into its layer."""
        for slot in self.slots:
            slot.restore()


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that are really in memory.

    Attributes:
        weights: Of the model's weights, stubs included.
        kv_cache: Of the KV caches in use.
    """

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.kv_cache


@dataclass
class LiveBlocks:
    """What is in the places of a model's blocks; shared by all who see the model.

    Attributes:
        sites: Where each block lives, (2L,).
        removed: The removed blocks by index, with the stub that stands there, if any does.
        lock: Held by whoever runs the model or changes what is in the places.
        caches: KV caches in use.
        weights: Lets go of removed blocks' weights; None: they stay.
    """

    sites: tuple[BlockSite, ...]
    removed: dict[int, Stub | None] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    weights: BlockWeights | None = None

    def place(self, wanted: Mapping[int, Stub | None], *, let_go: bool = False) -> None:
        """Remove exactly the blocks of `wanted`.

        Args:
            wanted: The blocks, with their stubs.
            let_go: Free the weights of all removed blocks, unless they are to stay. Before
                others are brought back, so that no more than either mask needs is in memory.

        Raises:
            RapError: A block's weights cannot be read again; it and those after it stay removed.
        """
        for index, stub in wanted.items():
            if index not in self.removed or self.removed[index] is not stub:
                self.sites[index].remove(stub)
                self.removed[index] = stub
        if self.weights is not None and let_go:
            for index in wanted:
                self.weights.let_go(index)
        for index in self.removed.keys() - wanted.keys():
            if self.weights is not None:
                self.weights.bring_back(index)
            self.sites[index].restore()
            del self.removed[index]

    def free_keys_and_values(self, mask: BlockMask) -> None:
        """Let every cache in use go of the attention blocks of a mask.

        Raises:
            UnsupportedCacheError: Some cache cannot; nothing changes in any.
        """
        caches = list(self.caches)
        if not caches:
            return
        from rap_env.llm import kv  # loads a part of transformers

        layers = frozenset(index // 2 for index in mask.indices if index % 2 == 0)
        for cache in caches:
            if kv.held_by(cache, layers):
                kv.check_cache(cache)
        for cache in caches:
            kv.let_go(cache, layers)

    def kv_bytes(self) -> int:
        """Bytes of all caches in use."""
        caches = list(self.caches)
        if not caches:
            return 0
        from rap_env.llm import kv

        return sum(kv.held_bytes(cache) for cache in caches)

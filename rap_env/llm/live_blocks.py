"""The plan that is applied to a live model, and its changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rap_env.blocks import BlockMask
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.llm import kv_cache
from rap_env.llm.adapter import BlockSite
from rap_env.llm.kv_cache import cache_bytes, check_cache, evict, layers_with_keys
from rap_env.llm.placeholders import Stub
from rap_env.llm.residency import BlockWeights
from rap_env.plan import CompressionPlan


@dataclass(frozen=True)
class HeldBytes:
    """Bytes in memory of the weights, stubs included, and of the KV caches in use."""

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Bytes of weights and KV caches."""
        return self.weights + self.kv_cache


@dataclass(frozen=True)
class LiveState:
    """A plan and what replaces its removed blocks.

    Attributes:
        plan: The level of each item.
        stubs: The stub in the place of each removed block, or None, by index.
    """

    plan: CompressionPlan = field(default_factory=CompressionPlan)
    stubs: Mapping[int, Stub | None] = field(default_factory=dict)


@dataclass
class LiveBlocks:
    """The applied plan of a model and what depends on it; shared by all views of the model.

    Attributes:
        sites: Where each block is, (2L,).
        state: The present plan.
        lock: Held by the thread that runs the model or changes its plan.
        caches: KV caches in use.
        weights: Evicts the weights of removed blocks; None if they stay in memory.
    """

    sites: tuple[BlockSite, ...]
    state: LiveState = field(default_factory=LiveState)
    lock: threading.RLock = field(default_factory=threading.RLock)
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    weights: BlockWeights | None = None
    _removed: dict[int, Stub | None] = field(default_factory=dict)
    _cache_levels: dict[int, CacheLevel] = field(default_factory=dict)

    @property
    def removed(self) -> Mapping[int, Stub | None]:
        """The removed blocks by index, with the stub in the block's place, or None."""
        return self._removed

    def set(self, wanted: LiveState, *, evict: bool = False) -> None:
        """Give every item its level in `wanted`.

        Args:
            wanted: The new state.
            evict: Free the weights of all removed blocks, unless the residency keeps them. This
                happens before others are loaded, so that memory never holds more than either plan
                needs.

        Raises:
            RapError: A block's weights cannot be read; that block and those after it stay removed.
        """
        try:
            self._set(wanted, evict)
        finally:
            mask = BlockMask(frozenset(self._removed))
            caches = tuple(self._cache_levels.items())
            plan = CompressionPlan(mask, caches=caches)
            self.state = wanted if plan == wanted.plan else LiveState(plan, dict(self._removed))

    def _set(self, wanted: LiveState, evict: bool) -> None:
        for index, stub in wanted.stubs.items():
            if index not in self._removed or self._removed[index] is not stub:
                self.sites[index].remove(stub)
                self._removed[index] = stub
        self._set_caches(wanted.plan.caches)
        if self.weights is not None and evict:
            for index in wanted.stubs:
                self.weights.evict(index)
        for index in self._removed.keys() - wanted.stubs.keys():
            if self.weights is not None:
                self.weights.load(index)
            self.sites[index].restore()
            del self._removed[index]

    def _set_caches(self, levels: Iterable[tuple[int, CacheLevel]]) -> None:
        wanted = dict(levels)
        for layer in self._cache_levels.keys() - wanted.keys():
            self.sites[2 * layer].set_cache_level(NATIVE_CACHE)
        for layer, level in wanted.items():
            if self._cache_levels.get(layer) != level:
                self.sites[2 * layer].set_cache_level(level)
        self._cache_levels = wanted

    def lower_caches(self, plan: CompressionPlan) -> None:
        """Evict and requantise keys and values in every cache in use, down to a plan's levels.

        Raises:
            UnsupportedCacheError: A cache does not allow it; none has changed.
        """
        caches = list(self.caches)
        if not caches:
            return
        layers = frozenset(index // 2 for index in plan.removed.indices if index % 2 == 0)
        for cache in caches:
            if layers_with_keys(cache, layers):
                check_cache(cache)
        for cache in caches:
            evict(cache, layers)
        lower = getattr(kv_cache, "lower", None)
        if lower is not None and plan.caches:
            for cache in caches:
                lower(cache, dict(plan.caches))

    def kv_bytes(self) -> int:
        """Bytes of all caches in use."""
        return sum(cache_bytes(cache) for cache in list(self.caches))

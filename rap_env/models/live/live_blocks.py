"""The plan that is applied to a live model, and its changes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rap_env.levels import NATIVE_CACHE, CacheLevel, WeightLevel
from rap_env.models.caches.kv_cache import cache_bytes, evict, lower
from rap_env.models.families.adapter import BlockSite, FamilyAdapter
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.residency import WeightStore
from rap_env.models.weights.tensors import named_weights, tensor_key
from rap_env.models.weights.weight_levels import WeightItem, level_bytes, packed_level
from rap_env.plan import Plan


@dataclass(frozen=True)
class HeldBytes:
    """Bytes in memory of the weights, of the KV caches in use, and of those that are kept."""

    weights: int
    kv_cache: int
    kept: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.kv_cache + self.kept


@dataclass
class LiveBlocks:
    """The applied plan of a model and what depends on it.

    Attributes:
        sites: Where each block is, (2L,).
        items: The weights of each block at their levels, (2L,).
        embeddings: The same for embeddings with head.
        plan: The present plan.
        lock: Held by the thread that runs the model or changes its plan.
        caches: KV caches in use.
        store: Evicts weights that are not in use; None if they stay in memory.
    """

    sites: tuple[BlockSite, ...]
    items: tuple[WeightItem, ...]
    embeddings: WeightItem
    plan: Plan = field(default_factory=Plan)
    lock: threading.RLock = field(default_factory=threading.RLock)
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    store: WeightStore | None = None
    _removed: set[int] = field(default_factory=set)
    _cache_levels: dict[int, CacheLevel] = field(default_factory=dict)
    _added_bytes: int | None = None  # None: to be counted

    @property
    def all_items(self) -> tuple[WeightItem, ...]:
        """The weights of all blocks, and of embeddings with head."""
        return (*self.items, self.embeddings)

    # Weights that are loaded or made now are used outside of it too.
    @torch.inference_mode(False)
    def prepare(self, target: Plan) -> None:
        """Make levels that did not exist so far, as far as they can be kept out of memory.

        Raises:
            ChecksumError: A file that `set` will read is damaged or was changed; nothing
                changes.
            ModelNotAvailableError: It is missing or cannot be read; nothing changes.
        """
        self._added_bytes = None
        if self.store is not None:
            for key, level in self._changes(target).items():
                self.store.prepare(self._item(key), level)
                self.store.check(self._item(key), level)

    def absent_levels(self, levels: Iterable[WeightLevel]) -> frozenset[WeightLevel]:
        """Those levels that a text has to make for some item."""
        return frozenset(n for n in levels if any(item.lacks(n) for item in self.all_items))

    @torch.inference_mode(False)
    def set(self, target: Plan, *, evict: bool = False) -> None:
        """Give every item its level in `target`; after an error all have the levels of before.

        Where those cannot be read any more either, blocks are removed.

        Args:
            target: The new plan; it is prepared first.
            evict: Free the weights that it does not use, unless the residency keeps them.
                This happens before others are loaded, so that memory never holds more than
                either plan needs.
        """
        if target == self.plan and not evict:
            return
        self.prepare(target)
        before = self.plan
        try:
            self._set(target, self._changes(target), evict)
        except BaseException:
            self._set_back(before)
            raise
        finally:
            self._added_bytes = None
        self.plan = target

    def _set(self, target: Plan, changes: Mapping[int, WeightLevel], evict: bool) -> None:
        for index in target.removed:
            self._remove(index)
        self._set_caches(target.caches)
        if self.store is not None and evict:
            for key, item in enumerate(self.all_items):
                self.store.release(item, self._level(target, key))
        for key, level in changes.items():
            self._set_level(key, level)

    def _set_back(self, plan: Plan) -> None:
        """Give every item its level in a plan again, wherever `_set` has failed."""
        self._set(plan, {}, evict=True)
        lost = []
        for key in range(len(self.items) + 1):
            if key not in plan.removed:
                try:
                    self._set_level(key, self._level(plan, key))
                except Exception:  # memory may be short, too
                    lost.append(key)
        for key in set(lost) - {len(self.items)}:
            self._remove(key)
        self.plan = plan.without(*self._removed - plan.removed)

    def _remove(self, index: int) -> None:
        if index not in self._removed:
            self.sites[index].remove()
            self._removed.add(index)

    def _changes(self, target: Plan) -> dict[int, WeightLevel]:
        """New levels of weights that stay or come into use; the key 2L stands for embeddings."""
        before = self.plan
        keys: set[int] = set()
        if before.embeddings != target.embeddings:
            keys.add(len(self.items))
        if before.weights != target.weights:
            changed = {*before.weights} ^ {*target.weights}
            keys.update(index for index, _ in changed)
        keys.update(self._removed)
        keys -= target.removed
        return {key: self._level(target, key) for key in sorted(keys, reverse=True)}

    def _set_level(self, key: int, level: WeightLevel) -> None:
        item = self._item(key)
        if self.store is not None:
            self.store.load(item, level)
        elif (packed := packed_level(level)) is not None and packed not in item.made:
            item.make(packed)
        item.put(level)
        if key in self._removed:
            self.sites[key].restore()
            self._removed.remove(key)

    def _item(self, key: int) -> WeightItem:
        return self.embeddings if key == len(self.items) else self.items[key]

    def _level(self, plan: Plan, key: int) -> WeightLevel:
        return plan.weight_level(key) if key < len(self.items) else plan.embeddings

    def _set_caches(self, levels: Iterable[tuple[int, CacheLevel]]) -> None:
        target = dict(levels)
        for layer in self._cache_levels.keys() - target.keys():
            self.sites[2 * layer].set_cache_level(NATIVE_CACHE)
        for layer, level in target.items():
            if self._cache_levels.get(layer) != level:
                self.sites[2 * layer].set_cache_level(level)
        self._cache_levels = target

    def lower_caches(self, plan: Plan) -> None:
        """Evict and requantise keys and values in every cache in use, down to a plan's levels."""
        layers = frozenset(index // 2 for index in plan.removed if index % 2 == 0)
        for cache in list(self.caches):
            evict(cache, layers)
            lower(cache, dict(plan.caches))

    @contextlib.contextmanager
    def without_store(self) -> Iterator[None]:
        """Have all native weights in memory, and no store, until a ``with`` block makes one."""
        before = self.plan
        self.set(Plan())
        if self.store is not None:
            self.store.load_embeddings(self.embeddings)
        for item in self.all_items:
            for level in item.made:
                if self.store is not None and not self.store.holds(item, level):
                    item.forget(level)
        self.store = None
        try:
            yield
        finally:
            self.set(before, evict=True)

    @property
    def added_bytes(self) -> int:
        """Bytes in memory of packed weights beside native ones, less those that are evicted."""
        if self._added_bytes is None:  # counted once for each plan: engines ask before each pass
            made_bytes = (item.made_bytes for item in self.all_items)
            self._added_bytes = sum(made_bytes) if self.store is None else self.store.added_bytes
        return self._added_bytes

    def kv_bytes(self) -> int:
        """Bytes of all caches in use."""
        return sum(cache_bytes(cache) for cache in list(self.caches))


def own_bytes(model: nn.Module, sites: Iterable[BlockSite]) -> tuple[tuple[int, ...], int]:
    """Bytes of each block's own tensors, (2L,), and bytes of all other tensors.

    No block may be removed from the model.
    """
    uses = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    own = []
    for site in sites:
        inside = Counter(tensor_key(t) for part in site.modules for _, t in named_weights(part))
        # A tensor that is also used elsewhere (tied) is not freed with the block.
        own.append(sum(key[-1] for key, count in inside.items() if count == uses[key]))
    return tuple(own), sum(key[-1] for key in uses) - sum(own)


def shared_facts(
    adapter: FamilyAdapter,
    live: LiveBlocks,
    weight_bytes: tuple[tuple[int, ...], int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """`ModelFacts` that follow from the modules; `weight_bytes` is from `own_bytes`."""
    own, base = weight_bytes
    per_token = adapter.kv_bytes_per_token(dtype.itemsize)
    has_cache = [not site.pruned for site in live.sites[::2]]
    native = (place.original for item in live.all_items for place in item.places)
    packed = any(isinstance(module, PackedModule) for module in native)
    return dict(
        dtype=str(dtype).removeprefix("torch."),
        block_param_bytes=own,
        base_bytes=base,
        kv_bytes_per_token=tuple(per_token if cached else 0 for cached in has_cache),
        kv_window_tokens=adapter.kv_window_tokens,
        itemsize=dtype.itemsize,
        hidden_size=adapter.hidden_size,
        ffn_width=adapter.ffn_width,
        vocab_size=adapter.vocab_size,
        max_positions=adapter.max_positions,
        weights="packed" if packed else "unquantised",
        **level_bytes(live.items, own, live.embeddings, base),
        widen_bytes=max(item.widen_bytes for item in live.all_items),
        kv_heads=tuple(adapter.kv_heads if cached else 0 for cached in has_cache),
        kv_head_size=(adapter.kv_head_size,) * adapter.num_layers,
    )

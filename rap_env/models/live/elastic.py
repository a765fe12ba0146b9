"""A live model whose blocks can be removed and restored exactly."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rap_env.errors import UnsupportedModelError, check_name
from rap_env.levels import NATIVE_CACHE, CacheLevel, WeightLevel
from rap_env.memory import ModelFacts
from rap_env.models.caches.attention import check_attention, install_levels
from rap_env.models.caches.kv_cache import cache_bytes, check_same_blocks, evict, lower
from rap_env.models.device import return_freed_memory
from rap_env.models.families.families import adapter_for
from rap_env.models.families.placeholders import cache_in
from rap_env.models.files.model_folder import remembered
from rap_env.models.live.lean_llama import reject_lean
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.packing import PackedLevel
from rap_env.models.weights.residency import RESIDENCIES, Residency, WeightStore
from rap_env.models.weights.tensors import (
    StoredTensor,
    distinct_weights,
    fingerprint_of,
    named_weights,
    tensor_key,
)
from rap_env.models.weights.weight_levels import (
    block_items,
    embeddings_item,
    level_bytes,
    packed_level,
)
from rap_env.plan import Plan, check_levels

LevelFiles = Sequence[Mapping[PackedLevel, Path]]
"""The files of levels that a text made, for each of `ElasticLLM.weight_items`."""


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


class ElasticLLM:
    """A causal language model whose blocks and caches follow a plan.

    A removed block's modules are replaced by placeholders without weights or computation, and
    those of a block with other weights by packed ones. This object keeps the originals, so
    that any plan can be undone exactly. While a plan is applied, `model` is what it leaves:
    its `state_dict()` and `parameters()` contain only the kept blocks, at their levels, so
    apply the empty plan before you move, convert or save `model` as a whole.

    Generation with a KV cache is exact under any plan (`generate`), and `apply` may change it
    between any two steps of a `LiveBatch`, from any thread; see also `set_residency`. Outputs
    such as ``output_attentions`` list only the kept blocks. If you call `model` directly
    while another thread changes plans, hold `exclusive`.

    Args:
        model: A causal language model of a known family. It is put into evaluation mode.
        tokenizer: Its tokenizer, or None if only token ids are used.
        name: Name of the model in results.
        folder: The folder from which its weights were read, if from safetensors files.
        unread: The weights of its blocks are placeholders so far, because they are to be read
            from `folder` when a plan needs them. At first all blocks are removed, and the
            residency is ``"drop"``.

    Attributes:
        model: The live model, as the current plan leaves it.
        adapter: Describes the blocks, from the config.
        plan: The plan that is applied now; `apply` changes it.
        sites: Where each block is, (2L,).
        weight_items: The weights of each block, and last those of embeddings with head, (2L + 1,).
        calibration: Hash of the text with which levels of few bits are made; empty without
            one.
        files_key: Names the files that hold exactly its weights, their state and its dtype;
            None for a model that was not loaded from files.
        as_stored: Whether its weights are those of the folder's files, each tensor in memory of
            its own: a residency then needs neither a copy nor a check of them.
        kept_bytes: Bytes of caches that are kept beside those in use; their owner counts them.
        calibrator: Makes them once they are needed and do not exist; None: `calibrate` first.

    Raises:
        UnsupportedModelError: The family is unknown or its layout cannot be masked, or its
            weights are on several devices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        folder: Path | None = None,
        unread: bool = False,
    ) -> None:
        self.adapter = adapter_for(model.config)
        _check_one_device(model, name)
        self.model = model.eval()
        install_levels(self.model, self.adapter)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        self.plan = Plan()
        self.sites = self.adapter.sites(model)
        self.weight_items = (*block_items(model, self.sites), embeddings_item(model))
        self.calibration = ""
        self.files_key: str | None = None
        self.as_stored = False
        self.kept_bytes = 0
        self.calibrator: Callable[[ElasticLLM], object] | None = None
        self._lock = threading.RLock()
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._store: WeightStore | None = None  # None: weights that are not in use stay in memory
        self._removed: set[int] = set()
        self._cache_levels: dict[int, CacheLevel] = {}
        self._added_bytes: int | None = None  # None: to be counted
        self._unread: list[tuple[str, torch.Tensor | StoredTensor]] = []
        if unread:
            self._begin_unread()

    def _begin_unread(self) -> None:
        """Remove all blocks, whose weights are in files; sizes are noted from placeholders."""
        weights, _ = list(distinct_weights(self.model)), self._own_bytes
        stored = self._add_store("drop", "", unread=True).stored()
        self._unread = [(name, stored.get(id(tensor), tensor)) for name, tensor in weights]
        self._set(Plan.removing(*range(self.num_blocks)), evict=True)

    @property
    def on_demand(self) -> bool:
        """Whether its blocks were left in files, from which plans read them."""
        return bool(self._unread)

    @property
    def num_blocks(self) -> int:
        """2L, an attn and an ffn block a layer."""
        return self.adapter.num_blocks

    @property
    def device(self) -> torch.device:
        """Device of the weights, where token ids are sent."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of activations and KV cache."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def level_files(self) -> LevelFiles:
        """The files of the levels that a text made, for each of `weight_items`."""
        return [dict(item.files) for item in self.weight_items]

    @cached_property
    def pruned(self) -> Plan:
        """Blocks that the model was built without (`load_pruned`); no mask restores them."""
        return Plan(frozenset(site.index for site in self.sites if site.pruned))

    def apply(self, plan: Plan) -> None:
        """Give every item its level in a plan; a mask's kept blocks are native.

        Waits for a step of another thread to end. Then caches are evicted or requantised, and
        weights that the plan does not use are freed as `set_residency` selects, before others
        are loaded.

        Raises:
            UnknownNameError: The model does not have an item or a level; nothing changes.
            UnsupportedCacheError: The model's attention knows no levels of caches; nothing
                changes.
            UnsupportedModelError: With residency ``"drop"``, the model's files lack the
                weights of the embeddings; nothing changes.
            StorageFullError: No space for the file of a level; nothing changes.
            ChecksumError: A file of weights is damaged or was changed; nothing changes.
            ModelNotAvailableError: A file of weights is missing or cannot be read; nothing
                changes.
        """
        with self.exclusive():
            self.prepare(plan)
            layers = frozenset(index // 2 for index in plan.removed if index % 2 == 0)
            for cache in list(self._caches):
                evict(cache, layers)
                lower(cache, dict(plan.caches))
            self._set(plan, evict=True)

    def prepare(self, plan: Plan) -> None:
        """Check that a plan can be applied now, and make levels that did not exist so far.

        Raises:
            RapError: As for `apply`.
        """
        with self.exclusive():
            self._prepare(self._target(plan))

    @contextlib.contextmanager
    def applied(self, plan: Plan) -> Iterator[ElasticLLM]:
        """Apply a plan for the duration of a ``with`` block, in which other threads wait.

        The earlier plan is restored afterwards, also after an error. Weights that are unused
        only inside the ``with`` block stay in memory.
        """
        with self.exclusive():
            before = self.plan
            try:
                self._set(self._target(plan))
                yield self
            finally:
                self._set(before, evict=True)

    def exclusive(self) -> AbstractContextManager[object]:
        """Keep other threads from running the model or changing its plan; may be nested."""
        return self._lock

    @contextlib.contextmanager
    def without(self, blocks: AbstractSet[int]) -> Iterator[None]:
        """Run without more blocks than the mask removes, for the duration of one step."""
        before = self.plan
        try:
            self._set(before.without(*blocks - self.pruned.removed))
            yield
        finally:
            self._set(before)

    def end_layers(self) -> AbstractContextManager[None]:
        """Run the first and the last layer alone, whose workspace is that of all layers."""
        return self.without(frozenset(range(2, self.num_blocks - 2)))

    @property
    def residency(self) -> Residency:
        """Where weights are kept that are not in use; see `rap_env.models.weights.residency`."""
        return "resident" if self._store is None else self._store.residency

    def set_residency(self, residency: Residency) -> None:
        """Select where weights are kept that the plan does not use, including those unused now.

        The first call with ``"offload"`` or ``"drop"`` copies every block's weights to a
        buffer and checks that they can be read again, unless they are `as_stored`; this takes
        seconds per GB.

        Args:
            residency: The residency.

        Raises:
            UnknownNameError: There is no such residency.
            UnsupportedModelError: ``"drop"`` without the model's own files.
            StorageFullError: No space for a file to offload to.
        """
        check_name("residency", residency, RESIDENCIES)
        with self.exclusive():
            if residency == self.residency:
                return
            before = self.plan
            self._set(Plan())
            self._remove_store()
            try:
                if residency != "resident":
                    self._add_store(residency, self.fingerprint, as_stored=self.as_stored)
            finally:
                self._set(before, evict=True)
        return_freed_memory(self.device)

    def _remove_store(self) -> None:
        """Have all native weights in memory; levels that are not are forgotten."""
        if self._store is not None:
            self._store.load_embeddings(self.weight_items[-1])
            for item in self.weight_items:
                for level in item.made:
                    if not self._store.holds(item, level):
                        item.forget(level)
        self._store = None

    def _add_store(self, residency: Residency, fingerprint: str, **options: bool) -> WeightStore:
        blocks, items = [site.modules for site in self.sites], self.weight_items
        self._store = store = WeightStore(
            self.model, items, blocks, self.folder, residency, fingerprint, **options
        )
        # From now on, refuse to move or convert the model as a whole.
        object.__setattr__(self.model, "_apply", _InPlace(self.model))
        return store

    @property
    def held_bytes(self) -> HeldBytes:
        """Bytes that the model's tensors and the KV caches in use take in memory now."""
        with self.exclusive():
            own, base = self._own_bytes
            if self._added_bytes is None:  # counted once for each plan: engines ask in each pass
                made_bytes = (item.made_bytes for item in self.weight_items)
                store = self._store
                self._added_bytes = sum(made_bytes) if store is None else store.added_bytes
            kv_bytes = sum(cache_bytes(cache) for cache in list(self._caches))
            return HeldBytes(base + sum(own) + self._added_bytes, kv_bytes, self.kept_bytes)

    def track_cache(self, cache: Any) -> None:
        """Let a `BatchCache` follow the plans that `apply` sets, until it is deleted."""
        self._caches.add(cache)

    @property
    def removed_attention(self) -> frozenset[int]:
        """Layers whose attention block is removed now."""
        removed = self.plan.removed | self.pruned.removed
        return frozenset(index // 2 for index in removed if index % 2 == 0)

    def absent_levels(self, levels: Iterable[WeightLevel]) -> frozenset[WeightLevel]:
        """Those levels that a text would have to make before a plan can have them."""
        return frozenset(n for n in levels if any(item.lacks(n) for item in self.weight_items))

    def _target(self, plan: Plan) -> Plan:
        """A plan whose levels all exist: those that a text makes are made."""
        plan.check(self.num_blocks)
        if plan.caches:
            check_attention(self.model)
        for index, level in plan.weights:
            if level not in (known := self.weight_items[index].levels):
                check_levels(plan, known)
        check_levels(Plan(embeddings=plan.embeddings), self.weight_items[-1].levels)
        if absent := self.absent_levels(plan.weight_levels):
            if self.calibrator is None:
                raise UnsupportedModelError(
                    f"{self.name} has no weights at {', '.join(sorted(absent))} so far: they are "
                    "made with a text; call rap_env.models.live.calibration.calibrate(llm, "
                    "windows) first."
                )
            self.calibrator(self)
        return plan

    # Weights that are loaded or made now are used outside of it too.
    @torch.inference_mode(False)
    def _prepare(self, target: Plan) -> None:
        """Make levels that did not exist so far, as far as they can be kept out of memory.

        Raises:
            ChecksumError: A file that `_set` will read is damaged or was changed; nothing
                changes.
            ModelNotAvailableError: It is missing or cannot be read; nothing changes.
        """
        self._added_bytes = None
        if self._store is not None:
            for key, level in self._changes(target).items():
                self._store.prepare(self.weight_items[key], level)
                self._store.check(self.weight_items[key], level)

    @torch.inference_mode(False)
    def _set(self, target: Plan, *, evict: bool = False) -> None:
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
        self._prepare(target)
        before = self.plan
        try:
            self._change(target, self._changes(target), evict)
        except BaseException:
            self._set_back(before)
            raise
        finally:
            self._added_bytes = None
        self.plan = target

    def _change(self, target: Plan, changes: Mapping[int, WeightLevel], evict: bool) -> None:
        for index in target.removed:
            self._remove(index)
        self._set_caches(target.caches)
        if self._store is not None and evict:
            for key, item in enumerate(self.weight_items):
                self._store.release(item, self._level(target, key))
        for key, level in changes.items():
            self._set_level(key, level)

    def _set_back(self, plan: Plan) -> None:
        """Give every item its level in a plan again, wherever `_change` has failed."""
        self._change(plan, {}, evict=True)
        lost = []
        for key in range(self.num_blocks + 1):
            if key not in plan.removed:
                try:
                    self._set_level(key, self._level(plan, key))
                except Exception:  # memory may be short, too
                    lost.append(key)
        for key in set(lost) - {self.num_blocks}:
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
            keys.add(self.num_blocks)
        if before.weights != target.weights:
            changed = {*before.weights} ^ {*target.weights}
            keys.update(index for index, _ in changed)
        keys.update(self._removed)
        keys -= target.removed
        return {key: self._level(target, key) for key in sorted(keys, reverse=True)}

    def _set_level(self, key: int, level: WeightLevel) -> None:
        item = self.weight_items[key]
        if self._store is not None:
            self._store.load(item, level)
        elif (packed := packed_level(level)) is not None and packed not in item.made:
            item.make(packed)
        item.put(level)
        if key in self._removed:
            self.sites[key].restore()
            self._removed.remove(key)

    def _level(self, plan: Plan, key: int) -> WeightLevel:
        return plan.weight_level(key) if key < self.num_blocks else plan.embeddings

    def _set_caches(self, levels: Iterable[tuple[int, CacheLevel]]) -> None:
        target = dict(levels)
        for layer in self._cache_levels.keys() - target.keys():
            self.sites[2 * layer].set_cache_level(NATIVE_CACHE)
        for layer, level in target.items():
            if self._cache_levels.get(layer) != level:
                self.sites[2 * layer].set_cache_level(level)
        self._cache_levels = target

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The decoder's output for unpadded sequences, (B, T) -> (B, T, H), with gradients."""
        with self.exclusive():
            output = self.adapter.decoder(self.model)(input_ids=input_ids, use_cache=False)
        last: torch.Tensor = output.last_hidden_state
        return last

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` without gradients, under the present plan until it ends.

        Other threads that apply a plan or generate wait until then; use `rap_env.Engine`
        where plans should change while requests run.

        Args:
            *args: As for transformers' ``generate``.
            **kwargs: As for transformers' ``generate``.

        Raises:
            UnsupportedCacheError: A cache was given that other attention blocks filled, or
                one that cannot have the plan's levels.
            UnsupportedModelError: The model's modules were replaced (`LiveBatch` runs them).
        """
        reject_lean(self.model, "generate (use LiveBatch)")
        with self.exclusive(), torch.no_grad():
            check_same_blocks(cache_in(kwargs), self.removed_attention)
            # A compiled forward would not notice that modules were replaced.
            return self.model.generate(*args, **{"disable_compile": True, **kwargs})

    @cached_property
    def _own_bytes(self) -> tuple[tuple[int, ...], int]:
        """Bytes of each block's own tensors, (2L,), and bytes of all other tensors."""
        with self.applied(Plan()):
            uses = Counter(tensor_key(tensor) for _, tensor in named_weights(self.model))
            own = []
            for site in self.sites:
                inside = Counter(tensor_key(t) for m in site.modules for _, t in named_weights(m))
                # A tensor that is also used elsewhere (tied) is not freed with the block.
                own.append(sum(key[-1] for key, count in inside.items() if count == uses[key]))
        return tuple(own), sum(key[-1] for key in uses) - sum(own)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and every weight (name, dtype, shape, bytes), in hex.

        Computed once for a state of the files, in about a second per GB. Mask, device and
        source do not matter.
        """
        if self.files_key is None:
            return self._fingerprint()
        return remembered(self.files_key, self._fingerprint)

    def _fingerprint(self) -> str:
        if self._unread:
            return fingerprint_of(self.model.config, self._unread)
        with self.applied(Plan()):
            return fingerprint_of(self.model.config, distinct_weights(self.model))

    @cached_property
    def facts(self) -> ModelFacts:
        """Facts about the unmasked model for the memory arithmetic."""
        adapter, dtype, (own, base) = self.adapter, self.dtype, self._own_bytes
        per_token = adapter.kv_bytes_per_token(dtype.itemsize)
        has_cache = [not site.pruned for site in self.sites[::2]]
        native = (place.original for item in self.weight_items for place in item.places)
        packed = any(isinstance(module, PackedModule) for module in native)
        return ModelFacts(
            name=self.name,
            fingerprint=self.fingerprint,
            calibration=self.calibration,
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
            **level_bytes(self.weight_items, own, base),
            widen_bytes=max(item.widen_bytes for item in self.weight_items),
            kv_heads=tuple(adapter.kv_heads if cached else 0 for cached in has_cache),
            kv_head_size=(adapter.kv_head_size,) * adapter.num_layers,
        )


def _check_one_device(model: Any, name: str) -> None:
    """Raise an error if the weights of a model are on several devices, or on disk."""
    places = {str(weight.device) for weight in model.parameters() if not weight.is_meta}
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        mapped = getattr(model, "hf_device_map", {}).values()
        places |= {f"cuda:{place}" if isinstance(place, int) else str(place) for place in mapped}
    if len(places) > 1:
        raise UnsupportedModelError(
            f"The weights of {name} are on several devices ({', '.join(sorted(places))}), but a "
            "model must be on one GPU or on the CPU: load it without a device_map, or with "
            "rap_env's load_llm(device=...). If it is too large, load it with on_demand=True, and "
            "apply a plan with weights at int4, which takes a quarter of the bytes."
        )


class _InPlace:
    """Stands in for `nn.Module._apply` of a model that must not be moved or converted any more.

    Other tensors (buffers of weights, copies on the host) would stay where they were, and a
    later pass would fail in the middle. What changes neither device nor dtype is allowed. The
    model has this object as an attribute, so it is referred to weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _InPlace:
        return _InPlace(memo[id(self._model())])

    def __call__(
        self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        model = cast("nn.Module", self._model())
        places = {str(w.device): w for w in model.parameters() if not w.is_meta}
        for weight in places.values():
            self._check(weight.new_empty(0), change)
        moved: nn.Module = nn.Module._apply(model, change, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _check(self, probe: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        changed = change(probe)
        if (changed.device, changed.dtype) != (probe.device, probe.dtype):
            raise UnsupportedModelError(
                f"The model cannot be moved or converted ({probe.device}, {probe.dtype} to "
                f"{changed.device}, {changed.dtype}), because its residency is not "
                "'resident': load it as it is to be, load_llm(device=..., dtype=...), and then set "
                "its residency."
            )

"""Bytes of a ladder's levels on one model, as `rap_env.memory` defines them. Without torch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from rap_env.errors import InfeasibleBudgetError
from rap_env.ladder.items import Counts, Item, Ladder
from rap_env.ladder.state import (
    SHARED_ROWS,
    LadderCosts,
    LevelTables,
    ShapeRow,
    SharedBytes,
    StackedCosts,
)
from rap_env.ladder.steps import LevelSteps
from rap_env.levels import GROUP_TOKENS, CacheLevel
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

_CACHED_LEVELS = 2**19  # cached levels of items, over all shapes of requests
_LEAST_SHAPES = 256


class LadderBytes:
    """Makes the costs of a ladder for requests on one model; the most recent ones are cached.

    Args:
        memory: The model's byte arithmetic.
        ladder: The items and their levels.
        base: Levels of caches that the ladder does not have; native ones by default.

    Attributes:
        tables: What the costs of all requests share.
    """

    def __init__(self, memory: MemoryModel, ladder: Ladder, base: Plan = Plan()) -> None:
        self.memory, self.ladder, self._base = memory, ladder, base
        item_bytes, numbers = np.zeros((2, len(ladder), ladder.width), dtype=np.int64)
        terms = [(0, 0, 0, False)]  # of bytes that are always 0
        number_of: dict[Any, int] = {}

        def number(level: CacheLevel, layer: int) -> int:
            key = level, memory.cache_shape(layer)  # such caches need equal bytes
            if key not in number_of:
                number_of[key] = len(terms)
                terms.append(memory.cache_terms(level, layer))
            return number_of[key]

        layers = range(memory.facts.num_layers)
        kept = [number(base.cache_level(layer), layer) for layer in layers]
        levels = [CacheLevel.of(name) for name in ("native", *ladder.cache_levels)]
        for index, item in enumerate(ladder.items):
            sizes, layer = _weight_bytes(memory, item), item.layer or 0
            fixed_cache = item.kind == "attn" and ladder.counterparts[index] == index
            for position, name in enumerate(item.levels):
                item_bytes[index, position] = sizes.get(name, 0)
                if item.kind == "cache":
                    numbers[index, position] = number(levels[position], layer)
                elif fixed_cache and name != "removed":
                    numbers[index, position] = kept[layer]
        self._kept_caches = np.bincount(kept, minlength=len(terms))
        self._tail_bytes, self._most, self._sizes, by_token = map(
            np.array, zip(*terms, strict=True)
        )
        self._not_by_token = 1 - by_token
        self._unit_tokens = np.where(by_token, 1, GROUP_TOKENS)
        # The numbers of the levels of caches, for each shape of a cache.
        self._caches = np.unique(numbers[list(ladder.caches), : len(levels)], axis=0)
        self.tables = LevelTables(ladder, item_bytes, numbers, len(terms))
        self._native_bytes = item_bytes[:, 0].sum()
        self._native_caches = np.bincount(numbers[:, 0], minlength=len(terms))
        self._native_caches[0] = 0
        # A model whose FFN blocks are not all in the ladder always keeps one.
        self._all_ffn = ladder.native_sharers.kept_ffn == memory.facts.num_layers
        self._kinds: dict[bytes, int] = {}
        if not len(self._caches):
            self._kind(self._caches)
        cached_shapes = max(_LEAST_SHAPES, _CACHED_LEVELS // item_bytes.size)
        self.costs = lru_cache(cached_shapes)(self._make)

    def stacked(self, batch_sizes: Counts, seq_lens_tokens: Counts) -> StackedCosts:
        """The costs of s shapes that the model can serve, (s,) each."""
        memory, shapes = self.memory, (batch_sizes, seq_lens_tokens)
        tokens = seq_lens_tokens[:, None]
        units = (tokens - self._not_by_token) // self._unit_tokens
        caches = np.minimum(units, self._most) * self._sizes
        caches += self._tail_bytes
        caches *= batch_sizes[:, None]
        kv_bytes, workspace = caches @ self._kept_caches, memory.workspaces(*shapes)
        attention = memory.attention_workspaces(*shapes)
        native_peak_bytes = self._fixed_bytes + kv_bytes + workspace
        if self._base.caches:
            native_peak_bytes = native_peak_bytes + attention
        kinds = self._kinds_of(caches)
        numbers = np.zeros((len(ShapeRow), len(batch_sizes)), dtype=np.int64)
        numbers[ShapeRow.BATCH_SIZE] = batch_sizes
        numbers[ShapeRow.SEQ_LEN_TOKENS] = seq_lens_tokens
        numbers[ShapeRow.NATIVE_PEAK_BYTES] = native_peak_bytes
        numbers[ShapeRow.KV_CACHE_BYTES] = kv_bytes
        native_bytes = self._native_bytes + caches @ self._native_caches
        numbers[ShapeRow.CONSTANT_BYTES] = native_peak_bytes - native_bytes
        if self._all_ffn:
            numbers[ShapeRow.LAST_FFN_BYTES] = workspace - memory.workspaces(*shapes, False)
        if len(self._caches):
            numbers[ShapeRow.LOWERED_CACHE_BYTES] = attention
        if not memory.facts.packed:
            numbers[ShapeRow.LOWERED_WEIGHTS_BYTES] = memory.facts.widen_bytes
        numbers[ShapeRow.STEPS] = kinds
        varying = np.concatenate([caches, caches], axis=1)
        nexts = self.tables.next_numbers[kinds]
        varying[:, len(self._sizes) :] -= caches[np.arange(len(kinds))[:, None], nexts]
        return StackedCosts(self.tables, numbers, varying)

    @cached_property
    def _fixed_bytes(self) -> int:
        """Bytes of the native model's weights, embeddings and head."""
        return self.memory.facts.base_bytes + sum(self.memory.facts.block_param_bytes)

    def _kinds_of(self, caches: Counts) -> Any:
        """The place of the steps of shapes in those of the tables, from their caches, (s, K)."""
        if not len(self._caches):
            return np.zeros(len(caches), dtype=np.int64)
        sizes = caches[:, self._caches]  # (s, shapes of a cache, levels)
        lower = np.tri(sizes.shape[-1], k=-1, dtype=bool).T & (
            sizes[..., None, :] < sizes[..., None]
        )
        nexts = np.where(lower.any(axis=-1), lower.argmax(axis=-1), -1)
        kinds = [self._kinds.get(entry.tobytes(), -1) for entry in nexts]
        for shape, kind in enumerate(kinds):
            if kind < 0:
                kinds[shape] = self._kind(nexts[shape])
        return kinds

    def _kind(self, nexts: Counts) -> int:
        """The place of the steps with these next levels of caches, (shapes of a cache, levels)."""
        key = nexts.tobytes()
        if key not in self._kinds:
            next_level = LevelSteps.every(self.ladder).next_level.copy()
            first = self.tables.numbers.reshape(next_level.shape)[:, 0]
            for numbers, lower in zip(self._caches, nexts, strict=True):
                alike = self.ladder.is_cache & (first == numbers[0])
                next_level[alike, : len(lower)] = lower
            self._kinds[key] = self.tables.add(LevelSteps(self.ladder, next_level))
        return self._kinds[key]

    def check_feasible(self, request: Request) -> None:
        """Reject a budget that no levels of the ladder can meet.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
            InfeasibleBudgetError: With every item at its lowest level, the request needs
                more.
        """
        least = self.costs(request.batch_size, request.seq_len_tokens).least_peak_bytes
        if request.budget_bytes >= least:
            return
        name, remedy = self.memory.facts.name, "Raise the budget, name lower levels,"
        plans, lowest = f"levels of {name} in this ladder fit", "the lowest ones need"
        if self.ladder.removes_only:
            plans, lowest = f"mask of {name} fits", "with every block removed it still needs"
            remedy = "Raise the budget,"
        raise InfeasibleBudgetError(
            f"No {plans} {request.budget_bytes:,} bytes for {request.batch_size} x "
            f"{request.seq_len_tokens} tokens: {lowest} {least:,} bytes. {remedy} or pass "
            "infeasible='clip' to the environment to serve the nearest budget that can be met."
        )

    def _make(self, batch_size: int, seq_len_tokens: int) -> LadderCosts:
        self.memory.check(batch_size, seq_len_tokens)
        return self.costs_of(self.stacked(np.array([batch_size]), np.array([seq_len_tokens])), 0)

    def costs_of(self, stacked: StackedCosts, shape: int) -> LadderCosts:
        """The costs of one shape of several, by its number."""
        tables, own = self.tables, stacked.of_shape(shape)
        item_bytes = own.item_bytes(tables.every_level, 0)
        item_bytes.flags.writeable = False
        numbers = own.numbers[:, 0].tolist()
        costs = LadderCosts(
            self.ladder,
            native_peak_bytes=numbers[ShapeRow.NATIVE_PEAK_BYTES],
            kv_cache_bytes=numbers[ShapeRow.KV_CACHE_BYTES],
            constant_bytes=numbers[ShapeRow.CONSTANT_BYTES],
            shared=SharedBytes(*numbers[SHARED_ROWS]),
            item_bytes=item_bytes,
            steps=tables.steps[numbers[ShapeRow.STEPS]],
        )
        vars(costs)["stacked"] = own  # costs with other steps make their own
        return costs


@lru_cache(maxsize=16)
def mask_bytes(memory: MemoryModel) -> LadderBytes:
    """The byte arithmetic over blocks that are kept or removed; one for each model."""
    return LadderBytes(memory, Ladder.of(memory.facts, "masks"))


def _weight_bytes(memory: MemoryModel, item: Item) -> dict[str, int]:
    """Bytes of an item that is no cache, by level."""
    facts = memory.facts
    if item.layer is None:
        return {str(level): size for level, size in facts.embedding_levels.items()}
    if item.kind == "cache":
        return {}
    return {str(level): size for level, size in facts.weight_levels(item.block).items()}

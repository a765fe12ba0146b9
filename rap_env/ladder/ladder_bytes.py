"""Bytes of a ladder's levels on one model, as `rap_env.memory` defines them. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rap_env.errors import InfeasibleBudgetError
from rap_env.ladder.items import Item, Ladder
from rap_env.ladder.state import LadderCosts, SharedBytes
from rap_env.ladder.steps import LevelSteps
from rap_env.levels import CacheLevel
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

_CACHED_LEVELS = 2**19  # cached levels of items, over all shapes of requests
_LEAST_SHAPES = 256
_CACHED_STEPS = 64


class LadderBytes:
    """Makes the costs of a ladder for requests on one model; the most recent ones are cached.

    Args:
        memory: The model's byte arithmetic.
        ladder: The items and their levels.
        base: Levels of caches that the ladder does not have; native ones by default.
    """

    def __init__(self, memory: MemoryModel, ladder: Ladder, base: Plan = Plan()) -> None:
        self.memory, self.ladder, self._base = memory, ladder, base
        shape = len(ladder), ladder.width
        self._weights, self._keeps_cache = np.zeros((2, *shape), dtype=np.int64)
        self._layers = np.array([item.layer or 0 for item in ladder.items])
        # Items that need equal bytes.
        self._caches: dict[tuple[int | None, ...], list[int]] = {}
        for number, item in enumerate(ladder.items):
            sizes = _weight_bytes(memory, item)
            fixed_cache = item.kind == "attn" and ladder.counterparts[number] == number
            for position, level in enumerate(item.levels):
                self._weights[number, position] = sizes.get(level, 0)
                self._keeps_cache[number, position] = fixed_cache and level != "removed"
            if item.kind == "cache":
                self._caches.setdefault(memory.cache_shape(item.layer or 0), []).append(number)
        self._cache_levels = [CacheLevel.of(name) for name in ("native", *ladder.cache_levels)]
        cached_shapes = max(_LEAST_SHAPES, _CACHED_LEVELS // (shape[0] * shape[1]))
        self.cached_costs = lru_cache(cached_shapes)(self._make)
        self._steps_of = lru_cache(_CACHED_STEPS)(self._make_steps)

    def costs(self, batch_size: int, seq_len_tokens: int) -> LadderCosts:
        """The costs of a batch size and a sequence length.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
        """
        return self.cached_costs(batch_size, seq_len_tokens)

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
        memory, items = self.memory, self.ladder.items
        request = Request(batch_size, seq_len_tokens, budget_bytes=1)
        dense_peak_bytes = memory.dense_peak_bytes(batch_size, seq_len_tokens)
        kv_bytes = memory.kv_bytes_by_layer(batch_size, seq_len_tokens)
        if self._base:
            dense_peak_bytes = memory.peak_bytes(self._base, request)
            for layer, level in self._base.caches:
                kv_bytes[layer] = memory.cache_bytes(level, layer, batch_size, seq_len_tokens)
        sizes = self._weights + self._keeps_cache * kv_bytes[self._layers][:, None]
        nexts = []
        for numbers in self._caches.values():
            layer = items[numbers[0]].layer or 0
            cache_bytes = [
                memory.cache_bytes(level, layer, batch_size, seq_len_tokens)
                for level in self._cache_levels
            ]
            sizes[numbers, : len(cache_bytes)] = cache_bytes
            nexts.append(_next_smaller(cache_bytes))
        sizes.flags.writeable = False
        workspace, without = (memory.workspace_bytes(request, any_ffn) for any_ffn in (True, False))
        # A model whose FFN blocks are not all in the ladder always keeps one.
        all_ffn = self.ladder.native_sharers.kept_ffn == memory.facts.num_layers
        last_ffn = workspace - without if all_ffn else 0
        widen = 0 if memory.facts.packed else memory.facts.widen_bytes
        attention = memory.attention_workspace_bytes(request) if self._caches else 0
        return LadderCosts(
            ladder=self.ladder,
            dense_peak_bytes=dense_peak_bytes,
            kv_cache_bytes=int(kv_bytes.sum()),
            constant_bytes=dense_peak_bytes - int(sizes[:, 0].sum()),
            shared=SharedBytes(last_ffn, attention, widen),
            item_bytes=sizes,
            steps=self._steps_of(tuple(nexts)),
        )

    def _make_steps(self, nexts: tuple[tuple[int, ...], ...]) -> LevelSteps:
        """The steps of requests with these next levels of caches, for each shape of a cache."""
        next_level = LevelSteps.every(self.ladder).next_level.copy()
        for numbers, lower in zip(self._caches.values(), nexts, strict=True):
            next_level[numbers, : len(lower)] = lower
        return LevelSteps(self.ladder, next_level)


@lru_cache(maxsize=16)
def mask_bytes(memory: MemoryModel) -> LadderBytes:
    """The byte arithmetic over blocks that are kept or removed; one for each model."""
    return LadderBytes(memory, Ladder.of(memory.facts, "masks"))


def _next_smaller(sizes: Sequence[int]) -> tuple[int, ...]:
    """The position of the next level that needs fewer bytes than each level, -1 without one."""
    return tuple(
        next((n for n in range(p + 1, len(sizes)) if sizes[n] < sizes[p]), -1)
        for p in range(len(sizes))
    )


def _weight_bytes(memory: MemoryModel, item: Item) -> dict[str, int]:
    """Bytes of an item that is no cache, by level."""
    facts = memory.facts
    if item.layer is None:
        return {str(level): size for level, size in facts.embedding_levels.items()}
    if item.kind == "cache":
        return {}
    return {str(level): size for level, size in facts.weight_levels(item.block).items()}

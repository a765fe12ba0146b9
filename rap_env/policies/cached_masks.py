"""The packaged policy over masks, on a base whose caches are stored in fewer bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rap_env.ladder.item_bytes import LadderBytes
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.method import CountingScorer, Method
from rap_env.policies.registry import packaged_policies, register
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


class LoweredCacheMemory(MemoryModel):
    """The byte arithmetic of a model all of whose caches have one level.

    Args:
        facts: The model's facts.
        level: The level of its caches.
    """

    def __init__(self, facts: ModelFacts, level: CacheLevel) -> None:
        super().__init__(facts)
        self._level = level

    def cache_bytes(
        self, level: CacheLevel, layer: int, batch_size: int, seq_len_tokens: int
    ) -> int:
        """Bytes of a layer's cache at a level; the native one is the level of all caches."""
        level = self._level if level.native else level
        return super().cache_bytes(level, layer, batch_size, seq_len_tokens)

    def kv_bytes_by_layer(self, batch_size: int, seq_len_tokens: int) -> npt.NDArray[np.int64]:
        """Bytes of each layer's cache at the level, shape (L,)."""
        layers = range(self.facts.num_layers)
        sizes = [self.cache_bytes(NATIVE_CACHE, n, batch_size, seq_len_tokens) for n in layers]
        return np.array(sizes, dtype=np.int64)

    def kv_cache_bytes(self, batch_size: int, seq_len_tokens: int) -> int:
        """Bytes of all caches at the level."""
        return int(self.kv_bytes_by_layer(batch_size, seq_len_tokens).sum())

    def _workspace(self, batch_size: int, seq_len_tokens: int, any_ffn: bool = True) -> int:
        attention = self.attention_workspace_bytes(Request(batch_size, seq_len_tokens, 1))
        attention = 0 if self._level.native else attention
        return super()._workspace(batch_size, seq_len_tokens, any_ffn) + attention


@register
class MasksOnLoweredCaches(Method):
    """The packaged policy of `RAPPrune-v0`, which removes blocks, on int8 caches.

    The policy sees the bytes of the int8 caches. Where the request does not fit even with every
    block removed, the caches are int4. Over masks the caches stay native.

    Raises:
        ArtifactError: The policy is not for a model of this shape.
    """

    name = "rap-v0"

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        facts, self._bases = self.memory.facts, list[tuple[Plan, Policy, MemoryModel]]()
        for level in ("native",) if self.removes_only else ("int8", "int4"):
            memory = LoweredCacheMemory(facts, CacheLevel.of(level))
            base = Plan.uniform(facts.num_layers, caches=level)
            self._bases.append((base, packaged_policies()[self.name](memory), memory))

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        for base, policy, memory in self._bases:
            if memory.least_peak_bytes(request) <= request.budget_bytes:
                return base.without(*policy.choose(request).removed)
        return base.without(*range(self.memory.facts.num_blocks))

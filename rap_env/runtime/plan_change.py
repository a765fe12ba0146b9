"""The difference between two plans: what is lowered, and what has to be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rap_env.blocks import block_index, block_name
from rap_env.levels import CacheLevel, WeightLevel
from rap_env.model_facts import ModelFacts
from rap_env.plan import EMBEDDINGS, Plan, cache_name


@dataclass(frozen=True)
class PlanChange:
    """A change from the plan `before` to the plan `after`."""

    before: Plan
    after: Plan

    @property
    def returns_attention(self) -> bool:
        """Whether removed attention blocks return."""
        return any(index % 2 == 0 for index in self.before.removed - self.after.removed)

    @property
    def raises_caches(self) -> bool:
        """Whether the cache of a block that is kept gets a better level."""
        return any(level.lowest(after) != after for level, after in self._kept_caches)

    @property
    def raises_two_bits(self) -> bool:
        """Whether a cache of 2 bits gets more: that is worth a pass over all tokens."""
        return any(level.bits == 2 and after.bits > 2 for level, after in self._kept_caches)

    @property
    def _kept_caches(self) -> list[tuple[CacheLevel, CacheLevel]]:
        kept = (pair for pair in self.before.caches if 2 * pair[0] not in self.after.removed)
        return [(level, self.after.cache_level(layer)) for layer, level in kept]

    def without_refill(self) -> Plan:
        """The plan `after`, in which attention stays removed and caches keep their lower level."""
        caches = dict(self.after.caches) | {
            layer: level.lowest(self.after.cache_level(layer))
            for layer, level in self.before.caches
        }
        staying = {index for index in self.before.removed - self.after.removed if index % 2 == 0}
        removed = self.after.removed | staying
        return replace(self.after, caches=tuple(caches.items()), removed=removed)

    def lowered_items(self, facts: ModelFacts, order: Sequence[int]) -> list[str]:
        """Items that are lower than before, by the sizes of levels in `facts`.

        Removed blocks come first, the last in `order` before the others.
        """
        before, after = self.before, self.after
        removed = [i for i in reversed(order) if i in after.removed - before.removed]
        weights = [i for i, level in after.weights if _is_lower(facts, i, level, before)]
        caches = [
            n
            for n, level in after.caches
            if 2 * n not in before.removed
            and before.cache_level(n).lowest(level) != before.cache_level(n)
        ]
        sizes = facts.embedding_levels
        embeddings = [EMBEDDINGS] if sizes[after.embeddings] < sizes[before.embeddings] else []
        return [*map(block_name, (*removed, *weights)), *embeddings, *map(cache_name, caches)]

    def with_item_before(self, item: str) -> Plan:
        """The plan `after`, in which one item has its level of before, its cache if it returns."""
        items = [item]
        if self.after.levels.get(item) == "removed" and item.endswith(".attn"):
            items.append(cache_name(block_index(item) // 2))
        levels = self.before.levels
        changed = self.after.levels | {name: levels.get(name, "native") for name in items}
        return Plan.of({name: level for name, level in changed.items() if level != "native"})


def _is_lower(facts: ModelFacts, index: int, level: WeightLevel, before: Plan) -> bool:
    sizes = facts.weight_levels(index)
    return sizes[level] < sizes[before.weight_level(index)]

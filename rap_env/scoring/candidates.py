"""The next plans of a search: one more block removed, or one item at a lower level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from rap_env.blocks import Block, block_name
from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.model_facts import ModelFacts
from rap_env.plan import EMBEDDINGS, Plan, cache_name

LEVELS = (*WEIGHT_LEVELS[1:], "int2")
"""Levels that `level_candidates` tries by default, of weights and of caches."""


def removal_candidates(blocks: Iterable[Block], plan: Plan) -> dict[Block, Plan]:
    """For every block that a plan keeps: the plan that also removes it."""
    kept = (block for block in blocks if block.index not in plan.removed)
    return {block: plan.without(block.index) for block in kept}


def level_candidates(
    facts: ModelFacts, plan: Plan = Plan(), levels: Collection[str] | None = None
) -> dict[tuple[str, str], Plan]:
    """For every item and each level below its own: the plan with the item at that level.

    Args:
        facts: The model's facts; only levels that it has are given.
        plan: Where the items are now. Removed blocks have no lower level.
        levels: Names of the levels to try, of weights and of caches (an item takes those that it
            has); None means `LEVELS`.

    Returns:
        Plans by item and level, in the order of the items, each from its highest level down.

    Raises:
        UnknownNameError: A level has a name that neither weights nor caches have.
    """
    start, wanted = plan, tuple(LEVELS if levels is None else levels)
    found: dict[tuple[str, str], Plan] = {}
    for item, level in _lower_levels(facts, plan, wanted):
        found[item, level] = start.lower({item: level})
    return found


def _lower_levels(
    facts: ModelFacts, plan: Plan, wanted: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    start = plan
    caches = [CacheLevel.of(name) for name in wanted if name not in ("native", "removed")]
    for index in range(facts.num_blocks):
        own = start.weight_level(index)
        for level in _below(own, facts.weight_levels(index)):
            if level in wanted:
                yield block_name(index), level
        if index % 2:
            continue
        for cache in caches:
            if own != "removed" and facts.kv_heads and _lower(cache, start.cache_level(index // 2)):
                yield cache_name(index // 2), cache.name
    for level in _below(start.embeddings, facts.embedding_levels):
        if level in wanted:
            yield EMBEDDINGS, level


def _below(level: str, levels: Iterable[str]) -> list[str]:
    """The levels after one, in their order."""
    names = list(levels)
    return names[names.index(level) + 1 :]


def _lower(cache: CacheLevel, other: CacheLevel) -> bool:
    """Whether a cache's level is below another one: it has no more bits and no more tokens."""
    return cache != other and other.lowest(cache) == cache


def shared_plan(plans: Sequence[Plan]) -> Plan:
    """What most of several plans share: from it, each plan of a search differs in a few items.

    Of masks it is what all of them remove. Of plans it is the most frequent level of each item, so
    that the plans that lower one item of a plan share that plan.
    """
    masks = [plan for plan in plans if plan.is_mask]
    if len(masks) == len(plans):
        return Plan(frozenset.intersection(*(mask.removed for mask in masks)))
    levels = [plan.levels for plan in plans]
    items = dict.fromkeys(item for one in levels for item in one)
    shared = {item: Counter(one.get(item) for one in levels).most_common(1)[0][0] for item in items}
    found = {item: level for item, level in shared.items() if level is not None}
    return Plan.of(found)


def sharing_order(plan: Plan, num_blocks: int) -> tuple[Any, ...]:
    """Sort key that puts plans next to those with which they share most of their first steps.

    Masks come in the order of their blocks, kept before removed ones.
    """
    if plan.is_mask:
        return ("", *((index in plan.removed, "", "") for index in range(num_blocks)))
    steps = []
    for index in range(num_blocks):
        weights = plan.weight_level(index)
        cache = "" if index % 2 else plan.cache_level(index // 2).name
        own = "" if weights in ("native", "removed") else weights
        steps.append((weights == "removed", own, "" if cache == "native" else cache))
    return ("" if plan.embeddings == "native" else plan.embeddings, *steps)

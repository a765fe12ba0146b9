"""Compression plans: a level for each item of a model. Plain values without torch.

The items of a model with L layers are the weights of its 2L blocks (``layer07.ffn``), the KV cache
of each attention block (``layer07.cache``), and the embeddings with the head (``embeddings``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

from rap_env.blocks import BlockMask, block_index, block_name
from rap_env.errors import ArtifactError, UnknownNameError, check_name
from rap_env.levels import NATIVE_CACHE, WEIGHT_LEVELS, CacheLevel, WeightLevel

EMBEDDINGS = "embeddings"
"""The item of the embeddings with the head; everything outside the blocks counts as part of it."""

_CACHE = ".cache"
_LOWERED: tuple[WeightLevel, ...] = ("int8", "int4")


@lru_cache(maxsize=4096)
def cache_name(layer: int) -> str:
    """The item of a layer's KV cache: ``layer07.cache`` for 7."""
    return f"{block_name(2 * layer).partition('.')[0]}{_CACHE}"


def is_cache(item: str) -> bool:
    """Whether an item is a KV cache, by its name."""
    return item.endswith(_CACHE)


def item_names(num_layers: int) -> tuple[str, ...]:
    """All items of a model with L layers: its blocks, its caches, its embeddings; (3L + 1,)."""
    blocks = map(block_name, range(2 * num_layers))
    return (*blocks, *map(cache_name, range(num_layers)), EMBEDDINGS)


@dataclass(frozen=True)
class CompressionPlan:
    """A level for each item: a frozen, hashable value. ``CompressionPlan()`` is the native model.

    Prefer `of` and `uniform` to the constructor, and the methods below to the attributes. Equal
    plans are equal values: entries are sorted, native ones are left out, and a removed block has no
    other level and no cache.

    Attributes:
        removed: The removed blocks.
        weights: Lowered blocks that are kept, as pairs of index and level.
        caches: Lowered caches of kept attention blocks, as pairs of layer and level.
        embeddings: The level of embeddings and head.

    Raises:
        UnknownNameError: There is no such block or level.

    >>> plan = CompressionPlan.of({"layer03.ffn": "removed", "layer00.cache": "int4"})
    >>> plan.weight_level(7), plan.cache_level(0).name, plan.removed.names
    ('removed', 'int4', ('layer03.ffn',))
    """

    removed: BlockMask = BlockMask()
    weights: tuple[tuple[int, WeightLevel], ...] = ()
    caches: tuple[tuple[int, CacheLevel], ...] = ()
    embeddings: WeightLevel = "native"

    def __post_init__(self) -> None:
        for _, level in self.weights:
            check_name("level of weights", level, WEIGHT_LEVELS)
        check_name("level of embeddings", self.embeddings, ("native", *_LOWERED))
        weights = {block_index(index): level for index, level in self.weights}
        removed = BlockMask.of(*(i for i, level in weights.items() if level == "removed"))
        if removed:
            object.__setattr__(self, "removed", self.removed | removed)
        gone = self.removed.indices
        kept = {i: v for i, v in weights.items() if v in _LOWERED and i not in gone}
        caches = {n: v for n, v in self.caches if not v.native and 2 * n not in gone}
        object.__setattr__(self, "weights", tuple(sorted(kept.items())))
        object.__setattr__(self, "caches", tuple(sorted(caches.items())))

    @classmethod
    def of(cls, levels: Mapping[str, str]) -> CompressionPlan:
        """The plan of some items' levels, by their names; all other items are native.

        Raises:
            UnknownNameError: There is no such item or level.
        """
        weights: list[tuple[int, Any]] = []
        caches = []
        embeddings: Any = "native"
        for item, level in levels.items():
            if item == EMBEDDINGS:
                embeddings = level
            elif isinstance(item, str) and is_cache(item):
                layer = block_index(f"{item.removesuffix(_CACHE)}.attn") // 2
                caches.append((layer, CacheLevel.of(level)))
            else:
                weights.append((block_index(item), level))
        return cls(BlockMask(), tuple(weights), tuple(caches), embeddings)

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        *,
        weights: WeightLevel = "native",
        caches: str | CacheLevel = NATIVE_CACHE,
        embeddings: WeightLevel = "native",
        removed: BlockMask = BlockMask(),
    ) -> CompressionPlan:
        """The same level for all blocks, and one for all caches, as llama.cpp has them.

        Raises:
            UnknownNameError: There is no such level.
        """
        level = caches if isinstance(caches, CacheLevel) else CacheLevel.of(caches)
        return cls(
            removed,
            tuple((index, weights) for index in range(2 * num_layers)),
            tuple((layer, level) for layer in range(num_layers)),
            embeddings,
        )

    @cached_property
    def _hash(self) -> int:
        return hash((self.removed, self.weights, self.caches, self.embeddings))

    def __hash__(self) -> int:
        return self._hash  # computed once: scorers look plans up again and again

    @cached_property
    def _weights(self) -> dict[int, WeightLevel]:
        return dict(self.weights)

    @cached_property
    def _caches(self) -> dict[int, CacheLevel]:
        return dict(self.caches)

    @property
    def is_mask(self) -> bool:
        """Whether every item is native or removed."""
        return not self.weights and not self.caches and self.embeddings == "native"

    def weight_level(self, index: int) -> WeightLevel:
        """The level of a block's weights, by the block's index."""
        return "removed" if index in self.removed.indices else self._weights.get(index, "native")

    def cache_level(self, layer: int) -> CacheLevel:
        """The level of a layer's KV cache; meaningless where the attention block is removed."""
        return self._caches.get(layer, NATIVE_CACHE)

    def lower(self, levels: Mapping[str, str]) -> CompressionPlan:
        """This plan with other levels for some items; removed blocks stay removed.

        Raises:
            UnknownNameError: There is no such item or level.
        """
        return CompressionPlan.of({**self.levels, **levels}).without(self.removed)

    def without(self, blocks: BlockMask) -> CompressionPlan:
        """This plan with more blocks removed."""
        return self if blocks <= self.removed else replace(self, removed=self.removed | blocks)

    def before(self, index: int) -> CompressionPlan:
        """The part of the plan that concerns the embeddings and blocks below `index`."""
        return CompressionPlan(
            BlockMask(frozenset(block for block in self.removed.indices if block < index)),
            tuple(pair for pair in self.weights if pair[0] < index),
            tuple(pair for pair in self.caches if 2 * pair[0] < index),
            self.embeddings,
        )

    @property
    def levels(self) -> dict[str, str]:
        """The levels of all items that are not native, by name; what `of` takes."""
        found: dict[str, str] = dict.fromkeys(self.removed.names, "removed")
        found |= {block_name(index): level for index, level in self.weights}
        found |= {cache_name(layer): level.name for layer, level in self.caches}
        return found if self.embeddings == "native" else {**found, EMBEDDINGS: self.embeddings}

    @cached_property
    def digest(self) -> str:
        """12 hex digits of a hash of `to_json`, by which answers and metrics name the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def summary(self) -> str:
        """All lowered items in one line: ``removed ffn 3; int4 cache 0-2``, or ``native``."""
        found = layers_by_level(self.levels).items()
        parts = (f"{level} {kind} {layer_ranges(numbers)}" for (level, kind), numbers in found)
        return "; ".join(part.rstrip() for part in parts) or "native"

    def check(self, num_blocks: int) -> CompressionPlan:
        """Return the plan itself if all its items exist in a model with `num_blocks` blocks.

        Raises:
            UnknownNameError: It names a block or a cache that the model does not have.
        """
        self.removed.check(num_blocks)
        worst = max([*self._weights, *(2 * layer for layer in self._caches)], default=-1)
        if worst >= num_blocks:
            BlockMask.of(worst).check(num_blocks)
        return self

    def to_json(self) -> str:
        """A JSON object of items and levels; for a mask the list of its blocks, as masks have."""
        return self.removed.to_json() if self.is_mask else json.dumps(self.levels, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """The plan that `to_json` wrote, here or in `BlockMask`.

        Raises:
            ArtifactError: The text is neither a JSON object of names nor a list of names.
            UnknownNameError: There is no such item or level.
        """
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ArtifactError(
                f"A plan should be a JSON object of items and levels: {error}."
            ) from None
        if isinstance(found, list):
            return cls(BlockMask.of(*found))
        if not isinstance(found, dict):
            raise ArtifactError(
                f"A plan should be a JSON object of items and levels, not {text!r}."
            )
        return cls.of(found)

    def __bool__(self) -> bool:
        return not self.is_mask or bool(self.removed)

    def __str__(self) -> str:
        if self.is_mask:
            return str(self.removed)
        return ", ".join(f"{level} {_shortened(items)}" for level, items in self._by_level())

    def _by_level(self) -> list[tuple[str, list[str]]]:
        found: dict[str, list[str]] = {}
        for item, level in self.levels.items():
            found.setdefault(level, []).append(item)
        return list(found.items())


MaskOrPlan: TypeAlias = BlockMask | CompressionPlan
"""What functions accept that take plans: a mask is a plan whose items are native or removed."""


def as_plan(plan: MaskOrPlan) -> CompressionPlan:
    """A mask or a plan as a plan."""
    return plan if isinstance(plan, CompressionPlan) else CompressionPlan(plan)


def simplest(plan: MaskOrPlan) -> MaskOrPlan:
    """A plan as a mask where it is one: equal plans are then equal keys, whichever was given."""
    return plan.removed if isinstance(plan, CompressionPlan) and plan.is_mask else plan


def only_mask(plan: MaskOrPlan, hint: str) -> BlockMask:
    """Return a mask or plan as a mask, for what works with blocks that are kept or removed only.

    Raises:
        UnknownNameError: The plan lowers an item; `hint` ends the message.
    """
    plan = simplest(plan)
    if isinstance(plan, BlockMask):
        return plan
    lowered = [f"{level} ({item})" for item, level in plan.levels.items() if level != "removed"]
    raise UnknownNameError("level", lowered[0], ["native", "removed"], hint)


def check_levels(plan: CompressionPlan, known: Iterable[str]) -> None:
    """Raise an `UnknownNameError` unless all lowered weights have a level among the known ones."""
    for level in {*plan._weights.values(), plan.embeddings} - {"native"}:
        if level not in known:
            raise UnknownNameError("level of weights", level, ["native", *known])


def layers_by_level(levels: Mapping[str, str]) -> dict[tuple[str, str], list[int]]:
    """The layers of items by level and kind of item; the embeddings have no layer."""
    found: dict[tuple[str, str], list[int]] = {}
    for item, level in levels.items():
        layer, _, kind = item.partition(".")
        numbers = found.setdefault((level, kind or item), [])
        if kind:
            numbers.append(int(layer.removeprefix("layer")))
    return found


def layer_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, in which runs are ranges, such as ``0-4 7 9-10``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _shortened(items: list[str], most: int = 4) -> str:
    more = len(items) - most
    return ", ".join(items) if more <= 1 else f"{', '.join(items[:most])} and {more} more"

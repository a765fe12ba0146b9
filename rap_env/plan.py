"""Plans: a level for each item of a model. Plain values without torch.

The items of a model with L layers are the weights of its 2L blocks (``layer07.ffn``), the KV
cache of each attention block (``layer07.cache``), and the embeddings with the head
(``embeddings``). A plan whose items are native or removed is a mask.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.levels import NATIVE_CACHE, WEIGHT_LEVELS, CacheLevel, WeightLevel

BlockKind = Literal["attn", "ffn"]
BLOCK_KINDS: tuple[BlockKind, BlockKind] = ("attn", "ffn")

EMBEDDINGS = "embeddings"
"""The item of the embeddings with the head; everything outside the blocks counts as part of
it."""

_BLOCK = re.compile(r"layer([0-9]+)\.(attn|ffn)")
_CACHE = ".cache"
_LOWERED = WEIGHT_LEVELS[1:-1]
_INT = frozenset((int,))


@lru_cache(maxsize=4096)
def block_name(index: int) -> str:
    """The name of block `index`: ``layer07.attn`` for 14, ``layer07.ffn`` for 15.

    A mixture-of-experts layer is one ffn block.
    """
    return f"layer{index // 2:02d}.{BLOCK_KINDS[index % 2]}"


def block_index(block: str | int) -> int:
    """The index of a block given by its name or index.

    Raises:
        UnknownNameError: The name does not have the form ``layerNN.attn`` or ``layerNN.ffn``,
            or the index is negative or no integer.
    """
    if type(block) is int and block >= 0:  # by far the most frequent case
        return block
    if isinstance(block, str):
        match = _BLOCK.fullmatch(block)
        if match:
            return 2 * int(match[1]) + BLOCK_KINDS.index(match[2])
    elif not isinstance(block, bool) and hasattr(block, "__index__") and block.__index__() >= 0:
        return block.__index__()
    hint = "A block is written layerNN.attn or layerNN.ffn, or given by its index from 0."
    # Suggest a block of the layer that was meant.
    layer = re.match(r"layer[0-9]+", str(block))
    known = [f"{layer[0] if layer else 'layer00'}.{kind}" for kind in BLOCK_KINDS]
    raise UnknownNameError("block", block, known, hint)


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
class Plan:
    """A level for each item: a frozen, hashable value. ``Plan()`` is the native model.

    Prefer `of`, `removing` and `uniform` to the constructor, and the methods below to the
    attributes. Equal plans are equal values: entries are sorted, native ones are left out,
    and a removed block has no other level and no cache.

    Attributes:
        removed: The indices of the removed blocks.
        weights: Lowered blocks that are kept, as pairs of index and level.
        caches: Lowered caches of kept attention blocks, as pairs of layer and level.
        embeddings: The level of embeddings and head.

    Raises:
        UnknownNameError: There is no such block or level.

    >>> plan = Plan.of({"layer03.ffn": "removed", "layer00.cache": "int4"})
    >>> plan.weight_level(7), plan.cache_level(0).name, plan.removed_names
    ('removed', 'int4', ('layer03.ffn',))
    >>> Plan.removing("layer03.ffn", 14).removed_names
    ('layer03.ffn', 'layer07.attn')
    """

    removed: frozenset[int] = frozenset()
    weights: tuple[tuple[int, WeightLevel], ...] = ()
    caches: tuple[tuple[int, CacheLevel], ...] = ()
    embeddings: WeightLevel = "native"

    def __post_init__(self) -> None:
        # Nearly always they are indices already, which this tells faster than one call for
        # each.
        removed = self.removed
        indices = type(removed) is frozenset and {*map(type, removed)} <= _INT
        if not indices or min(removed, default=0) < 0:
            removed = frozenset(map(block_index, removed))
            object.__setattr__(self, "removed", removed)
        if self.is_mask:
            return
        for _, level in self.weights:
            if level not in WEIGHT_LEVELS:
                raise UnknownNameError("level of weights", level, WEIGHT_LEVELS)
        if self.embeddings not in (known := ("native", *_LOWERED)):
            raise UnknownNameError("level of embeddings", self.embeddings, known)
        weights = {block_index(index): level for index, level in self.weights}
        removed = removed.union(i for i, level in weights.items() if level == "removed")
        kept = {i: v for i, v in weights.items() if v in _LOWERED and i not in removed}
        caches = {n: v for n, v in self.caches if not v.native and 2 * n not in removed}
        object.__setattr__(self, "removed", removed)
        object.__setattr__(self, "weights", tuple(sorted(kept.items())))
        object.__setattr__(self, "caches", tuple(sorted(caches.items())))

    @classmethod
    def of(cls, levels: Mapping[str, str]) -> Plan:
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
        return cls(frozenset(), tuple(weights), tuple(caches), embeddings)

    @classmethod
    def removing(cls, *blocks: str | int) -> Plan:
        """The plan that removes the given blocks (objects, names or indices).

        Raises:
            UnknownNameError: One of them does not name a block.
        """
        return cls(frozenset(map(block_index, blocks)))

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        *,
        weights: WeightLevel = "native",
        caches: str | CacheLevel = NATIVE_CACHE,
        embeddings: WeightLevel = "native",
    ) -> Plan:
        """The same level for all blocks, and one for all caches, as llama.cpp has them.

        Raises:
            UnknownNameError: There is no such level.
        """
        level = caches if isinstance(caches, CacheLevel) else CacheLevel.of(caches)
        return cls(
            frozenset(),
            tuple((index, weights) for index in range(2 * num_layers)),
            tuple((layer, level) for layer in range(num_layers)),
            embeddings,
        )

    @cached_property
    def _hash(self) -> int:
        return hash((self.removed, self.weights, self.caches, self.embeddings))

    def __hash__(self) -> int:
        return self._hash  # computed once: scorers look plans up again and again

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the hash, since that of a string differs between processes.
        return Plan, (self.removed, self.weights, self.caches, self.embeddings)

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

    @property
    def removed_names(self) -> tuple[str, ...]:
        """Names of the removed blocks, in ascending order of index."""
        return tuple(map(block_name, sorted(self.removed)))

    def count_removed(self, kind: BlockKind) -> int:
        """Number of removed blocks of one kind."""
        return sum(BLOCK_KINDS[index % 2] == kind for index in self.removed)

    @property
    def weight_levels(self) -> frozenset[WeightLevel]:
        """The packed levels that weights of blocks and embeddings have."""
        return frozenset({level for _, level in self.weights} | {self.embeddings} - {"native"})

    def weight_level(self, index: int) -> WeightLevel:
        """The level of a block's weights, by the block's index."""
        return "removed" if index in self.removed else self._weights.get(index, "native")

    def cache_level(self, layer: int) -> CacheLevel:
        """The level of a layer's KV cache; meaningless where the attention block is removed."""
        return self._caches.get(layer, NATIVE_CACHE)

    def lower(self, levels: Mapping[str, str]) -> Plan:
        """This plan with other levels for some items; removed blocks stay removed.

        Raises:
            UnknownNameError: There is no such item or level.
        """
        return Plan.of({**self.levels, **levels}).without(*self.removed)

    def without(self, *blocks: str | int) -> Plan:
        """This plan with more blocks removed (objects, names or indices).

        Raises:
            UnknownNameError: One of them does not name a block.
        """
        removed = self.removed.union(map(block_index, blocks))
        return self if removed == self.removed else replace(self, removed=removed)

    def before(self, index: int) -> Plan:
        """The part of the plan that concerns the embeddings and blocks below `index`."""
        return Plan(
            frozenset(block for block in self.removed if block < index),
            tuple(pair for pair in self.weights if pair[0] < index),
            tuple(pair for pair in self.caches if 2 * pair[0] < index),
            self.embeddings,
        )

    @property
    def levels(self) -> dict[str, str]:
        """The levels of all items that are not native, by name; what `of` takes."""
        levels: dict[str, str] = dict.fromkeys(self.removed_names, "removed")
        levels |= {block_name(index): level for index, level in self.weights}
        levels |= {cache_name(layer): level.name for layer, level in self.caches}
        return levels if self.embeddings == "native" else {**levels, EMBEDDINGS: self.embeddings}

    @cached_property
    def digest(self) -> str:
        """12 hex digits of a hash of `to_json`, by which answers and metrics name the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def summary(self) -> str:
        """All lowered items in one line: ``removed ffn 3; int4 cache 0-2``, or ``native``."""
        return _summary(self.levels) or "native"

    def summary_of_change(self, after: Plan) -> str:
        """The items that another plan changes, with its levels, in one line as in `summary`."""
        items = dict.fromkeys((*after.levels, *self.levels), "native") | after.levels
        return _summary({i: v for i, v in items.items() if v != self.levels.get(i, "native")})

    def check(self, num_blocks: int) -> Plan:
        """Return the plan itself if all its items exist in a model with `num_blocks` blocks.

        Raises:
            UnknownNameError: It names a block or a cache that the model does not have.
        """
        worst = max(self.removed, default=-1)
        if not self.is_mask:
            worst = max([worst, *self._weights, *(2 * layer for layer in self._caches)])
        if worst >= num_blocks:
            known = [f"layer00.attn ... {block_name(num_blocks - 1)}"]
            raise UnknownNameError("block", block_name(worst), known)
        return self

    def to_json(self) -> str:
        """A JSON object of items and levels, sorted by item."""
        return json.dumps(self.levels, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ArtifactError: The text is no JSON object of names.
            UnknownNameError: There is no such item or level.
        """
        try:
            levels = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ArtifactError(
                f"A plan should be a JSON object of items and levels: {error}."
            ) from None
        if not isinstance(levels, dict):
            raise ArtifactError(
                f"A plan should be a JSON object of items and levels, not {text!r}."
            )
        return cls.of(levels)

    def __bool__(self) -> bool:
        return not self.is_mask or bool(self.removed)

    def __str__(self) -> str:
        return self.summary


def check_levels(plan: Plan, known: Iterable[str]) -> None:
    """Raise an `UnknownNameError` unless all lowered weights have a level among the known ones."""
    for level in {*plan._weights.values(), plan.embeddings} - {"native"}:
        if level not in known:
            raise UnknownNameError("level of weights", level, ["native", *known])


def layers_by_level(levels: Mapping[str, str]) -> dict[tuple[str, str], list[int]]:
    """The layers of items by level and kind of item; the embeddings have no layer."""
    layers: dict[tuple[str, str], list[int]] = {}
    for item, level in levels.items():
        layer, _, kind = item.partition(".")
        numbers = layers.setdefault((level, kind or item), [])
        if kind:
            numbers.append(int(layer.removeprefix("layer")))
    return layers


def _summary(levels: Mapping[str, str]) -> str:
    layers = layers_by_level(levels).items()
    parts = (f"{level} {kind} {layer_ranges(numbers)}" for (level, kind), numbers in layers)
    return "; ".join(part.rstrip() for part in parts)


def layer_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, in which runs are ranges, such as ``0-4 7 9-10``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def with_lowest_caches(plan: Plan, rows_plan: Plan) -> Plan:
    """A plan with attention removed and caches lowered where they are in another one, too."""
    caches = dict(plan.caches) | {
        layer: level.lowest(plan.cache_level(layer)) for layer, level in rows_plan.caches
    }
    removed = plan.removed | {index for index in rows_plan.removed if index % 2 == 0}
    return replace(plan, caches=tuple(caches.items()), removed=removed)

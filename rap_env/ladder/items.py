"""Ladders: the items of a model that may be lowered, and the levels of each. Without torch."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.levels import (
    WEIGHT_LEVELS,
    CacheLevel,
    LevelSpec,
    WeightLevel,
    parse_levels,
    parse_together,
)
from rap_env.memory import ModelFacts
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name

SHARER_UNITS = np.array([1, 2**16, 2**32])
"""What counts as one in each part of a code of `Ladder.sharer_codes`."""

Kind = Literal["attn", "ffn", "cache", "embeddings"]
ITEM_KINDS: tuple[Kind, ...] = ("attn", "ffn", "cache", "embeddings")
"""Kinds of items: weights of the two kinds of blocks, caches, embeddings with head."""

Counts = npt.NDArray[np.int64]

Moves = tuple[tuple[int, int], ...]
"""Items that move to another level, and the positions of these levels."""


class Sharers(NamedTuple):
    """Numbers of the items of a plan that decide which bytes its items share, or arrays of them."""

    kept_ffn: Any
    lowered_caches: Any
    lowered_weights: Any


@dataclass(frozen=True)
class Item:
    """An item that has more than one level.

    Attributes:
        name: As in plans: ``layer07.ffn``, ``layer07.cache`` or ``embeddings``.
        kind: One of `ITEM_KINDS`.
        layer: Its layer; None for the embeddings.
        levels: Names of its levels, from the native one down.
    """

    name: str
    kind: Kind
    layer: int | None
    levels: tuple[str, ...]

    @property
    def block(self) -> int:
        """Its index if it is a block, else -1."""
        layer, kind = self.layer, self.kind
        return -1 if layer is None or kind == "cache" else 2 * layer + (kind == "ffn")

    def sharers(self, level: str) -> Sharers:
        """What the item alone counts for at a level."""
        lowered, cache = level not in ("native", "removed"), self.kind == "cache"
        kept_ffn = self.kind == "ffn" and level != "removed"
        return Sharers(int(kept_ffn), int(lowered and cache), int(lowered and not cache))


@dataclass(frozen=True, eq=False)
class Ladder:
    """The items of one model that have more than one level, in a fixed order.

    The order is that of `rap_env.plan.item_names`: blocks, caches, embeddings. An item's
    place in it is the number of the item, and of the action that lowers it. Lowering moves an
    item to its next level. A removed attention block takes its cache with it, which then has
    no level.

    Some levels are taken together: lowering a cache to one of them lowers every cache whose
    next level it is. Prefer `of` to the constructor.

    Attributes:
        items: The items.
        together: Names of the levels that all caches take together.
        levels: The levels below the native one that were asked for, by group of items; the
            model need not have all of them.

    Raises:
        InvalidRequestError: No item has more than one level.
    """

    items: tuple[Item, ...]
    together: tuple[str, ...] = ()
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise InvalidRequestError(
                "No item of the model has more than one of these levels, so there is nothing to "
                "lower; name levels that it has."
            )

    @classmethod
    def of(
        cls,
        facts: ModelFacts,
        levels: LevelSpec = "all",
        together: Sequence[str] = (),
    ) -> Ladder:
        """The ladder of a model.

        Args:
            facts: The model's facts. Weights have those of the levels that exist for their
                block.
            levels: A name of `LADDERS`; or a dict of levels for ``weights``, ``caches`` and
                ``embeddings``, each from the most to the least exact, ``native`` left out.
                What it does not name has its native level only. An item without int4-compact
                has int4 in its place.
            together: Names of levels that all caches take together; those that caches do not
                have are ignored.

        Raises:
            UnknownNameError: There is no such ladder, kind of item or level.
            InvalidRequestError: Levels are not in order, or no item has more than one.
        """
        asked = parse_levels(levels)
        items: list[Item] = []

        def add(name: str, kind: Kind, layer: int | None, names: Iterable[str]) -> None:
            chain = ("native", *names)
            if len(chain) > 1:
                items.append(Item(name, kind, layer, chain))

        for index in range(facts.num_blocks):
            names = _existing(asked["weights"], facts.weight_levels(index))
            add(block_name(index), "ffn" if index % 2 else "attn", index // 2, names)
        for layer in range(facts.num_layers):
            add(cache_name(layer), "cache", layer, asked["caches"])
        names = _existing(asked["embeddings"], facts.embedding_levels)
        add(EMBEDDINGS, "embeddings", None, names)
        return cls(tuple(items), parse_together(together), asked)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def spec(self) -> dict[str, Any]:
        """What makes the ladder of this or another model: arguments of `of`, as JSON values."""
        levels = {group: list(names) for group, names in self.levels.items()}
        return {"levels": levels, "together": list(self.together)}

    @cached_property
    def removes_only(self) -> bool:
        """Whether native and removed are the only levels."""
        return all(item.levels[1:] == ("removed",) for item in self.items)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each item, by its name."""
        return {item.name: number for number, item in enumerate(self.items)}

    @cached_property
    def width(self) -> int:
        """Most levels of an item, one more included: that of a cache whose block is removed."""
        return max(len(item.levels) for item in self.items) + 1

    @cached_property
    def level_names(self) -> tuple[tuple[str, ...], ...]:
        """The name of the level at each position of each item.

        One past the last level is ``removed``, for a cache whose block is removed.
        """
        return tuple((*item.levels, "removed") for item in self.items)

    @cached_property
    def counterparts(self) -> tuple[int, ...]:
        """The cache of each attention block and the reverse, by number; else the item itself."""
        counterparts = list(range(len(self)))
        for number, item in enumerate(self.items):
            if item.layer is not None and item.kind in ("attn", "cache"):
                attn = item.kind == "attn"
                other = cache_name(item.layer) if attn else block_name(2 * item.layer)
                counterparts[number] = self.numbers.get(other, number)
        return tuple(counterparts)

    @cached_property
    def pairs(self) -> tuple[frozenset[int], ...]:
        """Each item with its counterpart."""
        return tuple(frozenset(pair) for pair in enumerate(self.counterparts))

    @cached_property
    def removals(self) -> tuple[int, ...]:
        """The position of the level ``removed`` of each attention block; -2 for other items."""
        return tuple(
            item.levels.index("removed") if item.kind == "attn" and "removed" in item.levels else -2
            for item in self.items
        )

    @cached_property
    def counterpart_array(self) -> Counts:
        """`counterparts` as an array, (items,)."""
        return np.array(self.counterparts)

    @cached_property
    def is_cache(self) -> npt.NDArray[np.bool_]:
        """Whether each item is a cache, (items,)."""
        return np.array([item.kind == "cache" for item in self.items])

    @cached_property
    def first_levels(self) -> Counts:
        """Where the levels of each item begin if those of all items are in one row, (items,)."""
        return np.arange(len(self)) * self.width

    @cached_property
    def sharers(self) -> list[list[Sharers]]:
        """What each item counts for at each level, (items, W)."""
        return [
            [item.sharers(level) for level in names]
            + [Sharers(0, 0, 0)] * (self.width - len(names))
            for item, names in zip(self.items, self.level_names, strict=True)
        ]

    def count_sharers(self, positions: Sequence[int]) -> Sharers:
        """The numbers of a plan, from the positions of its levels, (items,)."""
        each = map(operator.getitem, self.sharers, positions)
        return Sharers(*map(sum, zip(*each, strict=True)))

    @cached_property
    def native_sharers(self) -> Sharers:
        """The numbers of the native plan."""
        return self.count_sharers([0] * len(self))

    @cached_property
    def sharer_codes(self) -> Counts:
        """`sharers` as one number each, in a row as in `first_levels`; sums have their sums."""
        return np.asarray(np.array(self.sharers).reshape(-1, 3) @ SHARER_UNITS)

    @cached_property
    def weight_levels(self) -> tuple[WeightLevel, ...]:
        """The packed levels that weights of blocks or embeddings may have."""
        names = {n for item in self.items if item.kind != "cache" for n in item.levels}
        return tuple(level for level in WEIGHT_LEVELS[1:-1] if level in names)

    @cached_property
    def caches(self) -> tuple[int, ...]:
        """The numbers of the caches; all have the same levels."""
        return tuple(number for number, item in enumerate(self.items) if item.kind == "cache")

    @cached_property
    def cache_levels(self) -> tuple[str, ...]:
        """The names of the levels of caches below the native one."""
        return self.items[self.caches[0]].levels[1:] if self.caches else ()

    @cached_property
    def removed_cache(self) -> int:
        """The position of a cache that was removed with its block: one past its last level."""
        return 1 + len(self.cache_levels)

    @cached_property
    def shared_positions(self) -> frozenset[int]:
        """The positions of the levels that caches take together."""
        levels = enumerate(self.cache_levels, start=1)
        return frozenset(position for position, level in levels if level in self.together)

    def reaches(self, positions: Counts) -> npt.NDArray[np.bool_]:
        """Whether plans can be reached although caches take some levels together, (n,).

        They can if all kept caches have the same level, or have passed all levels taken
        together.

        Args:
            positions: The position of each item's level, (n, items).
        """
        if not self.shared_positions:
            return np.ones(len(positions), dtype=bool)
        caches = positions[:, list(self.caches)]
        least = caches.min(axis=1)  # all removed: nothing is kept that could differ
        most = np.where(caches < self.removed_cache, caches, -1).max(axis=1)
        return np.asarray((least >= most) | (least >= max(self.shared_positions)))

    def positions(self, plan: Plan) -> list[int]:
        """The position of each item's level in its levels, (items,).

        A cache whose block is removed is one past its last level.

        Raises:
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        positions = [0] * len(self)
        entries = [
            *(("removed", block) for block in plan.removed),
            *(("weights", pair) for pair in plan.weights),
            *(("caches", pair) for pair in plan.caches),
            ("embeddings", plan.embeddings),
        ]
        try:
            for entry in entries:
                for number, position in self._places[entry]:
                    positions[number] = position
        except KeyError:
            raise self._unknown_level(plan) from None
        return positions

    @cached_property
    def _places(self) -> dict[tuple[str, Any], Moves]:
        """What each entry of a plan means here: items and the positions of their levels."""
        places: dict[tuple[str, Any], Moves] = {("embeddings", "native"): ()}
        for number, entries in enumerate(self._entries):
            for position, (part, entry) in enumerate(entries):
                if position:
                    places[part, entry] = ((number, position),)
            if entries[-1][0] == "removed" and self.counterparts[number] != number:
                places[entries[-1]] += ((self.counterparts[number], self.removed_cache),)
        return places

    def _unknown_level(self, plan: Plan) -> UnknownNameError:
        """The error for the first level of a plan that the ladder does not have."""
        for name, level in plan.levels.items():
            levels = self.items[self.numbers[name]].levels if name in self.numbers else ("native",)
            if level not in levels:
                return UnknownNameError(f"level of {name} in the ladder", level, levels)
        raise AssertionError("every level is known")

    def has(self, plan: Plan) -> bool:
        """Whether all levels of a plan are in the ladder."""
        try:
            self.positions(plan)
        except UnknownNameError:
            return False
        return True

    def plan(self, positions: Sequence[int]) -> Plan:
        """The plan whose items have the levels at these positions, (items,)."""
        parts: dict[str, list[Any]] = {"removed": [], "weights": [], "caches": [], "embeddings": []}
        for entries, position in zip(self._entries, positions, strict=True):
            if position and position < len(entries):
                part, entry = entries[position]
                parts[part].append(entry)
        return Plan(
            frozenset(parts["removed"]),
            tuple(parts["weights"]),
            tuple(parts["caches"]),
            parts["embeddings"][0] if parts["embeddings"] else "native",
        )

    @cached_property
    def _entries(self) -> tuple[tuple[tuple[str, Any], ...], ...]:
        """Where a plan has the level at each position of each item, and as which entry."""
        return tuple(tuple(_entry(item, level) for level in item.levels) for item in self.items)

    @cached_property
    def lowest(self) -> Plan:
        """The plan with each item at its lowest level."""
        return self.plan([len(item.levels) - 1 for item in self.items])


def _existing(asked: Sequence[str], exists: Collection[str]) -> Iterable[str]:
    """The levels that an item has of those that are asked for, in order."""
    compact: WeightLevel = "int4-compact"
    names = ("int4" if n == compact and compact not in exists else n for n in asked)
    return dict.fromkeys(name for name in names if name in exists)


def _entry(item: Item, level: str) -> tuple[str, Any]:
    """The attribute of `Plan` that has an item's level, and its entry there."""
    if item.layer is None:
        return "embeddings", level
    if item.kind == "cache":
        return "caches", (item.layer, CacheLevel.of(level))
    return ("removed", item.block) if level == "removed" else ("weights", (item.block, level))

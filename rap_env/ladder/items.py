"""Ladders: the items of a model that may be lowered, and the levels of each. Without torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask, block_name
from rap_env.errors import ArtifactError, InvalidRequestError, UnknownNameError, check_name
from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.model_facts import ModelFacts
from rap_env.plan import EMBEDDINGS, CompressionPlan, MaskOrPlan, as_plan, cache_name
from rap_env.specs import check_settings

Kind = Literal["attn", "ffn", "cache", "embeddings"]
KINDS: tuple[Kind, ...] = ("attn", "ffn", "cache", "embeddings")
"""Kinds of items: weights of the two kinds of blocks, caches, embeddings with head."""

CACHE_LEVELS = ("int8", "int4", "int4-window512", "int4-window256", "int4-window128")
"""Levels of caches in the named ladders, below the native one.

The level int2 is not among them: at 1,024 tokens a cache of the default model needs more bytes in
int2 than in int4-window128, and costs twice as much.
"""

LADDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "masks": {"weights": ("removed",)},
    "caches": {"caches": CACHE_LEVELS},
    "all": {
        "weights": WEIGHT_LEVELS[1:],
        "caches": CACHE_LEVELS,
        "embeddings": ("int8", "int4"),
    },
}
"""Named ladders: the levels below the native one, from the most to the least exact."""

_GROUPS = ("weights", "caches", "embeddings")
_KNOWN: dict[str, tuple[str, ...]] = {
    "weights": WEIGHT_LEVELS,
    "embeddings": ("native", "int8", "int4"),
}

LevelSpec = str | Mapping[str, Sequence[str]]
"""A name of `LADDERS`, or lists of levels for ``weights``, ``caches`` and ``embeddings``."""


@dataclass(frozen=True)
class Item:
    """An item that has more than one level.

    Attributes:
        name: As in plans: ``layer07.ffn``, ``layer07.cache`` or ``embeddings``.
        kind: One of `KINDS`.
        layer: Its layer; None for the embeddings.
        levels: Names of its levels, from the native one down.
    """

    name: str
    kind: Kind
    layer: int | None
    levels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Ladder:
    """The items of one model that have more than one level, in a fixed order.

    The order is that of `rap_env.plan.item_names`: blocks, caches, embeddings. An item's place in
    it is the number of the item, and of the action that lowers it. Lowering moves an item to its
    next level. A removed attention block takes its cache with it, which then has no level.

    Some levels are taken together: lowering a cache to one of them lowers every cache whose next
    level it is.

    Prefer `of` to the constructor.

    Attributes:
        items: The items.
        together: Names of the levels that all caches take together.
        levels: The levels below the native one that were asked for, by group of items; the model
            need not have all of them.

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
        cls, facts: ModelFacts, levels: LevelSpec = "all", together: Sequence[str] = ()
    ) -> Ladder:
        """The ladder of a model.

        Args:
            facts: The model's facts. Weights have those of the levels that exist for their block.
            levels: A name of `LADDERS`; or a dict of levels for ``weights``, ``caches`` and
                ``embeddings``, each from the most to the least exact, ``native`` left out. What
                it does not name has its native level only.
            together: Names of levels that all caches take together; those that caches do not have
                are ignored.

        Raises:
            UnknownNameError: There is no such ladder, kind of item or level.
            InvalidRequestError: Levels are not in order, or no item has more than one.
            ArtifactError: Levels of caches are asked for, and the facts do not say how caches
                can be stored.
        """
        wanted = parse_levels(levels)
        found: list[Item] = []

        def add(name: str, kind: Kind, layer: int | None, names: Iterable[str]) -> None:
            chain = ("native", *names)
            if len(chain) > 1:
                found.append(Item(name, kind, layer, chain))

        for index in range(facts.num_blocks):
            exists = facts.weight_levels(index)
            names = (level for level in wanted["weights"] if level in exists)
            add(block_name(index), "ffn" if index % 2 else "attn", index // 2, names)
        if wanted["caches"] and not facts.kv_heads:
            raise ArtifactError(
                f"The facts of {facts.name} do not say how its caches can be stored, so that they "
                "have no levels; leave out caches, or export the facts again with this version."
            )
        for layer in range(facts.num_layers):
            add(cache_name(layer), "cache", layer, wanted["caches"])
        exists = facts.embedding_levels
        add(EMBEDDINGS, "embeddings", None, (n for n in wanted["embeddings"] if n in exists))
        return cls(tuple(found), parse_together(together), wanted)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def spec(self) -> dict[str, Any]:
        """What makes the ladder of this or another model: arguments of `of`, as JSON values."""
        levels = {group: list(names) for group, names in self.levels.items()}
        return {"levels": levels, "together": list(self.together)}

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
    def partners(self) -> tuple[int, ...]:
        """The cache of each attention block and the reverse, by number; else the item itself."""
        found = list(range(len(self)))
        for number, item in enumerate(self.items):
            if item.layer is not None and item.kind in ("attn", "cache"):
                attn = item.kind == "attn"
                other = cache_name(item.layer) if attn else block_name(2 * item.layer)
                found[number] = self.numbers.get(other, number)
        return tuple(found)

    @cached_property
    def removals(self) -> tuple[int, ...]:
        """The position of the level ``removed`` of each attention block; -2 for other items."""
        return tuple(
            item.levels.index("removed") if item.kind == "attn" and "removed" in item.levels else -2
            for item in self.items
        )

    @cached_property
    def item_array(self) -> npt.NDArray[np.int64]:
        """The numbers of the items, (items,)."""
        return np.arange(len(self))

    @cached_property
    def partner_array(self) -> npt.NDArray[np.int64]:
        """`partners` as an array, (items,)."""
        return np.array(self.partners)

    @cached_property
    def removal_array(self) -> npt.NDArray[np.int64]:
        """`removals` as an array, (items,)."""
        return np.array(self.removals)

    @cached_property
    def caches(self) -> tuple[int, ...]:
        """The numbers of the caches; all have the same levels."""
        return tuple(number for number, item in enumerate(self.items) if item.kind == "cache")

    @cached_property
    def shared_positions(self) -> frozenset[int]:
        """The positions of the levels that caches take together."""
        levels = self.items[self.caches[0]].levels if self.caches else ()
        return frozenset(n for n, level in enumerate(levels) if level in self.together)

    def takers(self, item: int, next_of: Callable[[int], int]) -> tuple[int, ...]:
        """The items that are lowered with one, itself included.

        Args:
            item: Number of the item.
            next_of: Gives the position of an item's next level, or -1 if it has none.
        """
        lower = next_of(item)
        if lower in self.shared_positions and self.items[item].kind == "cache":
            return tuple(cache for cache in self.caches if next_of(cache) == lower)
        return (item,)

    def reaches(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether plans can be reached although caches take some levels together, (n,).

        They can if all kept caches have the same level, or have passed all levels taken together.

        Args:
            positions: The position of each item's level, (n, items).
        """
        if not self.shared_positions:
            return np.ones(len(positions), dtype=bool)
        caches = positions[:, list(self.caches)]
        gone = len(self.items[self.caches[0]].levels)
        least = np.where(caches < gone, caches, gone).min(axis=1)
        most = np.where(caches < gone, caches, -1).max(axis=1)
        return np.asarray((least >= most) | (least >= max(self.shared_positions)))

    @cached_property
    def cache_levels(self) -> tuple[str, ...]:
        """The names of the levels of caches below the native one."""
        caches = (item.levels[1:] for item in self.items if item.kind == "cache")
        return next(caches, ())

    def positions(self, plan: MaskOrPlan) -> list[int]:
        """The position of each item's level in its levels, (items,).

        A cache whose block is removed is one past its last level.

        Raises:
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        plan = as_plan(plan)
        if not plan:
            return [0] * len(self)
        levels, found = plan.levels, []
        for item in self.items:
            level = levels.pop(item.name, "native")
            check_name(f"level of {item.name} in the ladder", level, item.levels)
            gone = item.kind == "cache" and 2 * (item.layer or 0) in plan.removed
            found.append(len(item.levels) if gone else item.levels.index(level))
        if levels:
            name, level = next(iter(levels.items()))
            raise UnknownNameError(f"level of {name} in the ladder", level, ["native"])
        return found

    def has(self, plan: MaskOrPlan) -> bool:
        """Whether all levels of a plan are in the ladder."""
        try:
            self.positions(plan)
        except UnknownNameError:
            return False
        return True

    def plan(self, positions: Sequence[int]) -> CompressionPlan:
        """The plan whose items have the levels at these positions, (items,)."""
        found: dict[str, list[Any]] = {"removed": [], "weights": [], "caches": [], "embeddings": []}
        for entries, position in zip(self._entries, positions, strict=True):
            if position and position < len(entries):
                part, entry = entries[position]
                found[part].append(entry)
        return CompressionPlan(
            BlockMask(frozenset(found["removed"])),
            tuple(found["weights"]),
            tuple(found["caches"]),
            found["embeddings"][0] if found["embeddings"] else "native",
        )

    @cached_property
    def _entries(self) -> tuple[tuple[tuple[str, Any], ...], ...]:
        """Where a plan has the level at each position of each item, and as which entry."""
        return tuple(tuple(_entry(item, level) for level in item.levels) for item in self.items)

    @cached_property
    def lowest(self) -> CompressionPlan:
        """The plan with each item at its lowest level."""
        return self.plan([len(item.levels) - 1 for item in self.items])

    def next_level(self, plan: MaskOrPlan, item: str | int) -> str | None:
        """The level below that of an item, by name or number; None if there is none.

        Raises:
            UnknownNameError: There is no such item, or the plan is none of the ladder's.
        """
        number = self._number(item)
        levels, position = self.items[number].levels, self.positions(plan)[number]
        return levels[position + 1] if position + 1 < len(levels) else None

    def lower(self, plan: MaskOrPlan, item: str | int) -> CompressionPlan:
        """The plan after an item, by name or number, and all that are taken together, is lowered.

        Raises:
            UnknownNameError: There is no such item, it is at its lowest level, or the plan is none
                of the ladder's.
        """
        number = self._number(item)
        positions = self.positions(plan)
        lasts = [len(found.levels) - 1 for found in self.items]
        if positions[number] >= lasts[number]:
            lower = [o.name for n, o in enumerate(self.items) if positions[n] < lasts[n]]
            raise UnknownNameError("item with a lower level", self.items[number].name, lower)
        for one in self.takers(
            number, lambda n: positions[n] + 1 if positions[n] < lasts[n] else -1
        ):
            positions[one] += 1
        return self.plan(positions)

    def valid_actions(self, plan: MaskOrPlan) -> npt.NDArray[np.bool_]:
        """True for each item that has a lower level, (items,).

        Raises:
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        last = [len(item.levels) - 1 for item in self.items]
        return np.array(self.positions(plan)) < np.array(last)

    def _number(self, item: str | int) -> int:
        if isinstance(item, str):
            check_name("item", item, self.numbers)
            return self.numbers[item]
        if not 0 <= item < len(self):
            raise UnknownNameError("item", item, self.numbers)
        return int(item)


def _entry(item: Item, level: str) -> tuple[str, Any]:
    """The attribute of `CompressionPlan` that has an item's level, and its entry there."""
    if item.layer is None:
        return "embeddings", level
    if item.kind == "cache":
        return "caches", (item.layer, CacheLevel.of(level))
    index = 2 * item.layer + (item.kind == "ffn")
    return ("removed", index) if level == "removed" else ("weights", (index, level))


def parse_levels(levels: LevelSpec) -> dict[str, tuple[str, ...]]:
    """The levels below the native one that a spec names, for each of the three kinds of items.

    Raises:
        UnknownNameError: There is no such ladder, kind of item or level.
        InvalidRequestError: Levels are neither a name nor lists of names, or not in order.
    """
    if isinstance(levels, str):
        check_name("ladder", levels, LADDERS)
        levels = LADDERS[levels]
    if not isinstance(levels, Mapping):
        raise InvalidRequestError(
            f"levels must be a name ({', '.join(LADDERS)}) or a dict of lists, not {levels!r}."
        )
    check_settings(levels, "levels", _GROUPS)
    found: dict[str, tuple[str, ...]] = {}
    for group in _GROUPS:
        given = levels.get(group, ())
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InvalidRequestError(f"levels of {group} must be a list of names, not {given!r}.")
        names = tuple(given)
        chain = names if names[:1] == ("native",) else ("native", *names)
        for name in chain:
            _check_level(group, name)
        pairs = itertools.pairwise(chain)
        if not all(_is_below(group, lower, higher) for higher, lower in pairs):
            raise InvalidRequestError(
                f"Levels of {group} must go from the most to the least exact one, each with no "
                f"more bits and no longer window than the one before it, not {list(given)!r}."
            )
        found[group] = chain[1:]
    return found


def parse_together(names: Sequence[str]) -> tuple[str, ...]:
    """The levels of caches that a list names.

    Raises:
        UnknownNameError: There is no such level of a cache.
        InvalidRequestError: It is no list.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InvalidRequestError(f"together must be a list of levels of caches, not {names!r}.")
    return tuple(CacheLevel.of(name).name for name in names)


def _check_level(group: str, name: Any) -> None:
    if group == "caches":
        CacheLevel.of(name)
    else:
        check_name(f"level of {group}", name, _KNOWN[group])


def _is_below(group: str, lower: str, higher: str) -> bool:
    if group == "caches":
        below, above = CacheLevel.of(lower), CacheLevel.of(higher)
        return below != above and above.lowest(below) == below
    order = _KNOWN[group]
    return order.index(lower) > order.index(higher)

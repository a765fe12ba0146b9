"""Specifications of ladders: the levels that items may have, as names in configurations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rap_env.errors import InvalidRequestError, check_name
from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.specs import check_settings

CACHE_LEVELS = ("int8", "int4", "int4-window512", "int4-window256", "int4-window128")
"""Levels of caches in the named ladders, below the native one.

The level int2 is not among them: at 1,024 tokens a cache of the default model needs more bytes in
int2 than in int4-window128, and costs twice as much.
"""

LADDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "masks": {"weights": ("removed",)},
    "caches": {"caches": CACHE_LEVELS},
    "four-bits": {
        "weights": ("int8", "int4", "removed"),
        "caches": CACHE_LEVELS,
        "embeddings": ("int8", "int4"),
    },
    "all": {
        "weights": ("int8", "int4-compact", "int3", "int2", "removed"),
        "caches": CACHE_LEVELS,
        "embeddings": ("int8", "int4-compact", "int3"),
    },
}
"""Named ladders: the levels below the native one, from the most to the least exact.

``all`` has int4 only where an item has no int4-compact, which loses as little with half a bit less.
``four-bits`` was ``all`` before there were levels of fewer bits; older results are of it.
"""

_GROUPS = ("weights", "caches", "embeddings")
_KNOWN: dict[str, tuple[str, ...]] = {
    "weights": WEIGHT_LEVELS,
    "embeddings": WEIGHT_LEVELS[:-1],
}

LevelSpec = str | Mapping[str, Sequence[str]]
"""A name of `LADDERS`, or lists of levels for ``weights``, ``caches`` and ``embeddings``."""


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
    names_by_group: dict[str, tuple[str, ...]] = {}
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
        names_by_group[group] = chain[1:]
    return names_by_group


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

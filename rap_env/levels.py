"""Levels: the storage formats of weights and of KV caches, and their bytes. Without torch.

====================  ==========================================================================
Level of weights      Storage
====================  ==========================================================================
``native``            as the model is loaded: unquantised, or packed as the model's file has it
``int8``              8 bits a weight, one scale per output row
``int4``              4 bits a weight, scale and zero of 16 bits for each group of 32 inputs
``int4-compact``      the same with a scale and a zero of 8 bits
``int3``              3 bits a weight, a scale of 8 and a zero of 4 bits for each group of 32
``int2``              2 bits a weight, a scale of 8 and a zero of 4 bits for each group of 16
``removed``           none
====================  ==========================================================================

A KV cache is cut into groups of `GROUP_TOKENS` tokens, counted from each sequence's own first
token. The token at position t sees the keys and values of earlier groups as the cache stores
them, and those of its own group unquantised: they are in the *tail*, a buffer of one group.
So the result depends neither on how a prompt is cut into chunks nor on padding.

====================  ==========================================================================
Level of a cache      Storage
====================  ==========================================================================
``native``            unquantised (bfloat16 on most machines)
``int8``              symmetric: a scale per group of keys and per value
``int4``, ``int2``    scale and zero per group of keys and per value
``window512``         native, for the first group (attention sinks) and the last 512 tokens
``int4-window512``    both
====================  ==========================================================================

Keys are quantised per channel, over the tokens of a group, because some channels have
outliers (Liu et al. 2024, KIVI); values per token, over groups of up to 32 channels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

from rap_env.errors import InvalidRequestError, UnknownNameError, check_name
from rap_env.specs import check_settings

WeightLevel = Literal["native", "int8", "int4", "int4-compact", "int3", "int2", "removed"]
WEIGHT_LEVELS: tuple[WeightLevel, ...] = get_args(WeightLevel)
"""Levels of weights, from the most to the least exact one."""

GROUP_TOKENS = 32
"""Tokens of one group of a KV cache."""

SINK_GROUPS = 1
"""Groups at the start of a sequence that a window keeps (attention sinks)."""

SCALE_BYTES = 2
"""Bytes of a scale or a zero in a cache (bfloat16)."""

ATTENTION_WORKSPACE_BYTES = 4 * 2**20
"""Most bytes that attention over stored groups unpacks at a time, with its scores."""

_NAME = re.compile(r"(?P<bits>native|int8|int4|int2)?-?(window(?P<window>[0-9]+))?")
_KNOWN = ("native", "int8", "int4", "int2", "window512", "int4-window512")


@dataclass(frozen=True, order=True)
class CacheLevel:
    """The storage format of one attention block's KV cache. ``CacheLevel()`` is native.

    Attributes:
        bits: Bits of a stored value: 8, 4 or 2; 16 stands for unquantised values of any
            width.
        window_tokens: Most recent tokens that are kept besides the sinks, a multiple of
            `GROUP_TOKENS`; None keeps all.

    Raises:
        UnknownNameError: There is no such width or window.
    """

    bits: int = 16
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        window = self.window_tokens
        if self.bits not in (16, 8, 4, 2) or (
            window is not None and (window < GROUP_TOKENS or window % GROUP_TOKENS)
        ):
            hint = f"A window is a positive multiple of {GROUP_TOKENS} tokens."
            raise UnknownNameError("level of a cache", self.name, _KNOWN, hint)

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, name: str) -> CacheLevel:
        """The level of a name such as ``int4`` or ``int4-window512``.

        Raises:
            UnknownNameError: The name has another form.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or not name or name.startswith("-") or name.endswith("-"):
            hint = f"A window is a positive multiple of {GROUP_TOKENS} tokens."
            raise UnknownNameError("level of a cache", name, _KNOWN, hint)
        bits = 16 if match["bits"] in (None, "native") else int(match["bits"][3:])
        return cls(bits, None if match["window"] is None else int(match["window"]))

    @cached_property
    def name(self) -> str:
        """The level's name in plans, files and tables."""
        window = "" if self.window_tokens is None else f"window{self.window_tokens}"
        bits = f"int{self.bits}" if self.bits != 16 else ("" if window else "native")
        return "-".join(filter(None, (bits, window)))

    @property
    def native(self) -> bool:
        """Whether the cache is stored as the model computes it."""
        return self.bits == 16 and self.window_tokens is None

    def sees(self, own: int, group: int) -> bool:
        """Whether a token of group `own` sees an earlier group."""
        recent = self.window_tokens is None or group >= own - self.window_tokens // GROUP_TOKENS
        return group < own and (recent or group < SINK_GROUPS)

    def lowest(self, other: CacheLevel) -> CacheLevel:
        """The level with the smaller width and the shorter window of two."""
        windows = [w for w in (self.window_tokens, other.window_tokens) if w is not None]
        return CacheLevel(min(self.bits, other.bits), min(windows, default=None))

    def groups_held(self, tokens: int, model_window: int | None = None) -> int:
        """Groups that are stored beside the tail once a sequence has `tokens` tokens.

        A group leaves the tail when the first token of the next one arrives. Windows reuse
        the slots of groups that they have passed, so that the number never falls.

        Args:
            tokens: Tokens of the sequence so far, at least 1.
            model_window: Tokens that the model's own sliding window keeps between two steps
                (one less than its width), or None.
        """
        held = (tokens - 1) // GROUP_TOKENS  # the next group is in the tail
        if model_window is not None:
            held = min(held, -(-model_window // GROUP_TOKENS))
        if self.window_tokens is not None:
            held = min(held, SINK_GROUPS + self.window_tokens // GROUP_TOKENS)
        return held

    def group_bytes(self, heads: int, head_size: int, itemsize: int) -> int:
        """Bytes of one stored group of one sequence: keys, values, scales and zeros.

        Args:
            heads: Key and value heads.
            head_size: Channels of a head.
            itemsize: Bytes of an unquantised value.
        """
        values = GROUP_TOKENS * heads * head_size  # of keys, and as many of values
        if self.bits == 16:
            return 2 * values * itemsize
        scales = heads * head_size + GROUP_TOKENS * heads * channel_groups(head_size)
        return 2 * values * self.bits // 8 + scales * (1 if self.bits == 8 else 2) * SCALE_BYTES

    def row_bytes(
        self,
        tokens: int,
        heads: int,
        head_size: int,
        itemsize: int,
        model_window: int | None = None,
    ) -> int:
        """Bytes of one layer's cache for one sequence of `tokens` tokens, at least 1.

        Raises:
            ValueError: The level is native: such a cache has no groups; it takes its tokens'
                bytes.
        """
        if self.native:
            raise ValueError("A native cache is not stored in groups.")
        tail = 2 * GROUP_TOKENS * heads * head_size * itemsize
        groups = self.groups_held(tokens, model_window)
        return tail + groups * self.group_bytes(heads, head_size, itemsize)


NATIVE_CACHE = CacheLevel()
"""An unquantised cache that keeps all tokens."""


def channel_groups(head_size: int) -> int:
    """Groups of channels in which the values of one token and head are quantised."""
    return head_size // GROUP_TOKENS if head_size % GROUP_TOKENS == 0 else 1


CACHE_LADDER = ("int8", "int4", "int4-window512", "int4-window256", "int4-window128")
"""Levels of caches in the named ladders, below the native one.

The level int2 is not among them: at 1,024 tokens a cache of the default model needs more
bytes in int2 than in int4-window128, and costs twice as much.
"""

LADDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "masks": {"weights": ("removed",)},
    "caches": {"caches": CACHE_LADDER},
    "four-bits": {
        "weights": ("int8", "int4", "removed"),
        "caches": CACHE_LADDER,
        "embeddings": ("int8", "int4"),
    },
    "all": {
        "weights": ("int8", "int4-compact", "int3", "int2", "removed"),
        "caches": CACHE_LADDER,
        "embeddings": ("int8", "int4-compact", "int3"),
    },
}
"""Named ladders: the levels below the native one, from the most to the least exact.

``all`` has int4 only where an item has no int4-compact, which loses as little with half a bit
less. ``four-bits`` has no levels of fewer bits.
"""

_GROUPS = ("weights", "caches", "embeddings")
_ORDERS: dict[str, tuple[str, ...]] = {
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
        check_name(f"level of {group}", name, _ORDERS[group])


def _is_below(group: str, lower: str, higher: str) -> bool:
    if group == "caches":
        below, above = CacheLevel.of(lower), CacheLevel.of(higher)
        return below != above and above.lowest(below) == below
    order = _ORDERS[group]
    return order.index(lower) > order.index(higher)

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
token. The token at position t sees the keys and values of earlier groups as the cache stores them,
and those of its own group unquantised: they are in the *tail*, a buffer of one group. So the result
depends neither on how a prompt is cut into chunks nor on padding.

====================  ==========================================================================
Level of a cache      Storage
====================  ==========================================================================
``native``            unquantised (bfloat16 on most machines)
``int8``              symmetric: a scale per group of keys and per value
``int4``, ``int2``    scale and zero per group of keys and per value
``window512``         native, for the first group (attention sinks) and the last 512 tokens
``int4-window512``    both
====================  ==========================================================================

Keys are quantised per channel, over the tokens of a group, because some channels have outliers
(Liu et al. 2024, KIVI); values per token, over groups of up to 32 channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

from rap_env.errors import UnknownNameError

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
        bits: Bits of a stored value: 8, 4 or 2; 16 stands for unquantised values of any width.
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

        A group leaves the tail when the first token of the next one arrives. Windows reuse the
        slots of groups that they have passed, so that the number never falls.

        Args:
            tokens: Tokens of the sequence so far, at least 1.
            model_window: Tokens that the model's own sliding window keeps between two steps (one
                less than its width), or None.
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
            ValueError: The level is native: such a cache has no groups; it takes its tokens' bytes.
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

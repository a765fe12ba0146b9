"""Bytes that the items of a ladder share, and what of their levels determines them."""

from __future__ import annotations

from typing import Any, NamedTuple

from rap_env.ladder.items import Item

KEPT_FFN, LOWERED_CACHE, LOWERED_WEIGHTS = 1, 2, 4
"""Flags of an item's level: what of it determines the bytes that items share."""


def flags_of(item: Item, level: str) -> int:
    """The flags of an item's level."""
    if item.kind == "cache":
        return 0 if level == "native" else LOWERED_CACHE
    kept_ffn = KEPT_FFN if item.kind == "ffn" and level != "removed" else 0
    return kept_ffn | (0 if level in ("native", "removed") else LOWERED_WEIGHTS)


class SharedBytes(NamedTuple):
    """Bytes that items share: numbers, or arrays with an entry for each plan.

    Attributes:
        last_ffn: Bytes by which the workspace shrinks when the last FFN block is removed.
        lowered_cache: Bytes that attention needs while at least one lowered cache is left.
        lowered_weights: Bytes that at least one lowered block, or lowered embeddings, needs.
    """

    last_ffn: Any
    lowered_cache: Any
    lowered_weights: Any

    def of(self, flags: Any) -> Any:
        """The shared bytes if some item has each of the flags."""
        return (
            self.lowered_cache * (flags & LOWERED_CACHE != 0)
            + self.lowered_weights * (flags & LOWERED_WEIGHTS != 0)
            - self.last_ffn * (flags & KEPT_FFN == 0)
        )

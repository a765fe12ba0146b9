"""Rows of a forward pass, and what its new tokens see: between a cache and its attention.

Shapes: B sequences (rows), b of them with equal positions, K key and value heads, D channels of a
head, Q columns of a pass, T columns so far, G stored groups.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import ATTENTION_WORKSPACE_BYTES, GROUP_TOKENS, SINK_GROUPS, CacheLevel
from rap_env.models.caches.cache_codes import Groups, split

PIECE_VALUES = ATTENTION_WORKSPACE_BYTES // 16
"""Numbers of a piece of keys or values: float32, and as much again for codes and scores."""


@dataclass
class Step:
    """The rows of one forward pass, before and after it.

    Attributes:
        before: Tokens of each row before the pass, without padding, (B,).
        after: Tokens of each row after it, (B,).
        columns: T after the pass.
        memo: What layers with equal rows on one device share, such as masks.
    """

    before: list[int]
    after: list[int]
    columns: int
    memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: int, queries: int, held: int, mask: torch.Tensor | None) -> Step:
        """The step of a pass with a padding mask (B, T), or without padding.

        Raises:
            UnsupportedCacheError: There is padding between tokens of a row.
        """
        columns = held + queries
        if mask is None or mask.shape != (batch, columns):
            return cls([held] * batch, [columns] * batch, columns)
        real = mask.bool()
        pads = (~real).long().cumprod(dim=1).sum(dim=1)
        whole = torch.arange(columns, device=mask.device) >= pads[:, None]
        if held and not torch.equal(real, whole):
            raise UnsupportedCacheError(
                "A quantised or windowed KV cache needs all padding on the left; this attention "
                "mask has some between or after the tokens. Set padding_side='left'."
            )
        after = [columns - pad for pad in pads.tolist()]
        return cls([max(0, count - queries) for count in after], after, columns)


_CURRENT = threading.local()


def current_step() -> Step | None:
    """The step of this thread's forward pass; `rap_env.models.caches.attention_levels` sets it."""
    return getattr(_CURRENT, "step", None)


def set_current_step(step: Step | None) -> Step | None:
    """Set the step of this thread's forward pass; returns the one before."""
    before = current_step()
    _CURRENT.step = step
    return before


@dataclass(frozen=True)
class Bundle:
    """Rows of a chunk with equal numbers of earlier and of new tokens.

    Attributes:
        rows: Their indices, or None for all rows.
        before: Tokens before the chunk.
        new: New tokens: the last ones of the chunk's columns.
        keys: Unquantised keys from the start of the group that token `before` - 1 is in, or of
            token 0: (b, K, tail + new, D).
        values: The same of values.
        groups: Stored groups of the tokens before, of all rows of the layer; None without any.
        slots: The group in each slot of `groups`, -1 for none, in order of slots.
        later: The keys and values of complete groups of `keys` and `values` as they are stored,
            (b, K, F, 32, D) each.
    """

    rows: list[int] | None
    before: int
    new: int
    keys: torch.Tensor
    values: torch.Tensor
    groups: Groups | None
    slots: list[int]
    later: tuple[torch.Tensor, torch.Tensor]

    @property
    def first_group(self) -> int:
        """The group in which `keys` and `values` start."""
        return stored_groups(self.before)


@dataclass(frozen=True)
class Chunk:
    """New tokens of a layer with what they see: stands for keys and for values.

    Attributes:
        level: The level of the stored groups.
        window: The layer's sliding window, or None.
        bundles: Rows with equal positions; empty if `token` is set.
        token: The layer, if each row has one new token and that is in the layer already.
        step: The rows.
    """

    level: CacheLevel
    window: int | None
    step: Step
    bundles: tuple[Bundle, ...] = ()
    token: Any = None


def in_groups(states: torch.Tensor, count: int) -> torch.Tensor:
    """The first groups of keys or values, (B, K, tokens, D) -> (B, K, count, 32, D)."""
    return split(states[:, :, : count * GROUP_TOKENS], 2, count, GROUP_TOKENS)


def equal_rows(before: Sequence[int], after: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Rows with new tokens, by their numbers of tokens before and after."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(before, after, strict=True)):
        if pair[1] > pair[0]:
            found.setdefault(pair, []).append(row)
    return found


def stored_groups(tokens: int) -> int:
    """Groups of a row that have left the tail."""
    return max(0, tokens - 1) // GROUP_TOKENS


def visible_groups(level: CacheLevel, own: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Whether tokens of some groups see stored groups; shapes broadcast."""
    seen = (group >= 0) & (group < own)
    if level.window_tokens is not None:
        recent = group >= own - level.window_tokens // GROUP_TOKENS
        seen &= recent | (group < SINK_GROUPS)
    return seen


def capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores s as ``cap * tanh(s / cap)``, in place."""
    return scores.div_(cap).tanh_().mul_(cap)

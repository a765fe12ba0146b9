"""One pass for rows whose caches have different levels: each part of the rows has its own cache.

Weights are read once for all rows; attention runs once for each part. Rows of a part have the
same levels, and are padded to the longest of the part alone.

Shapes: B sequences (rows) of all parts, b of one, K key and value heads, N heads, Q queries
of a row, T columns so far, D channels of a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from rap_env.levels import CacheLevel
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import ForwardPass, current_step, set_current_step
from rap_env.models.caches.kv_cache import (
    Past,
    levels_of,
    missing,
    note_rows,
)
from rap_env.models.caches.layers import reserved_tokens, with_room
from rap_env.models.device import send
from rap_env.plan import Plan


@dataclass
class RowPart:
    """Rows whose caches have the same levels.

    Attributes:
        rows: Their tokens.
        cache: Their cache; None if it has to be computed.
    """

    rows: list[list[int]]
    cache: Any = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def plan(self, plan: Plan, *, lowest: bool = False) -> Plan:
        """A plan with the levels that the cache has, or with the lowest of both that stay.

        Attention blocks that the cache lacks are removed.
        """
        if self.cache is None:
            return plan
        levels = levels_of(self.cache, lasting=lowest)
        return _at_levels(plan, levels, missing(self.cache), lowest)

    def select(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep some rows, in this order, and free the memory of the others and common padding."""
        if list(rows) == list(range(len(self.rows))):
            return
        before, cache = self.length, self.cache
        self.rows, self.cache = [self.rows[row] for row in rows], None
        if cache is None:
            return
        index = _index(rows, device)
        for layer in cache.layers:
            select_rows(layer, self.length, index, before - self.length)
        self.cache = cache
        note_rows(cache, self.lengths)


def merged(parts: Sequence[RowPart], new: int = 0) -> list[RowPart]:
    """Parts in which neighbours with caches at equal levels, of the same layers, are one.

    Those that copies can raise and those that they cannot stay apart.

    Args:
        parts: Parts with caches; they must not be used afterwards.
        new: Last tokens of each row that are not cached yet.
    """
    neighbours: list[RowPart] = []
    for _, group in itertools.groupby(parts, key=_kind):
        first, *others = group
        for part in others:
            length = max(first.length, part.length) - new
            for mine, theirs in zip(first.cache.layers, part.cache.layers, strict=True):
                _concatenate(mine, theirs, length)
            first.rows = first.rows + part.rows
            note_rows(first.cache, [length - new for length in first.lengths])
        neighbours.append(first)
    return neighbours


def _kind(part: RowPart) -> tuple[Any, ...]:
    cache = part.cache
    return levels_of(cache), levels_of(cache, lasting=True), missing(cache)


def columns_of(rows: Sequence[Sequence[int]], first: int, end: int, device: torch.device) -> Past:
    """Columns of the matrix of rows, padded on the left; the mask starts at column 0."""
    length = max(map(len, rows))
    pads = [length - len(row) for row in rows]
    lines = [
        [pad, *[0] * (min(end, pad) - first), *row[max(0, first - pad) : max(0, end - pad)]]
        for pad, row in zip(pads, rows, strict=True)
    ]
    sent = send(torch.tensor(lines), device)  # all in one tensor
    positions = torch.arange(end, device=device) - sent[:, :1]
    return Past(sent[:, 1:], (positions >= 0).long(), positions[:, first:].clamp(min=0))


_Levels = tuple[tuple[int, CacheLevel], ...]


@functools.lru_cache(maxsize=64)
def _at_levels(plan: Plan, levels: _Levels, absent: frozenset[int], lowest: bool) -> Plan:
    own = {n: level.lowest(plan.cache_level(n)) if lowest else level for n, level in levels}
    caches = tuple(sorted({**dict(plan.caches), **own}.items()))
    return replace(plan, caches=caches, removed=plan.removed | {2 * layer for layer in absent})


def _index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return send(torch.tensor(rows), device)


def _cached_tokens(layer: Any, length: int) -> int:
    """Tokens that a layer holds of sequences of `length` tokens."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def select_rows(layer: Any, length: int, rows: torch.Tensor, cut: int) -> None:
    """Select rows of a layer, and cut off padding on the left that they do not need."""
    if layer.keys is None:
        return
    if isinstance(layer, GroupedLayer):
        layer.select_rows(rows)
        layer.cumulative_length -= cut
        return
    cached = _cached_tokens(layer, length)
    room = reserved_tokens(layer)
    layer.keys = with_room([layer.keys[rows]], cached, room)
    layer.values = with_room([layer.values[rows]], cached, room)
    if layer.is_sliding:
        layer.cumulative_length -= cut


def _concatenate(mine: Any, theirs: Any, length: int) -> None:
    """Append the rows of a layer, padded to `length` tokens, to another one of its level."""
    if isinstance(mine, GroupedLayer):
        mine.append_rows(theirs, length)
        return
    cached = _cached_tokens(mine, length)
    room = reserved_tokens(mine)
    mine.keys, theirs.keys = with_room([mine.keys, theirs.keys], cached, room), None
    mine.values, theirs.values = with_room([mine.values, theirs.values], cached, room), None
    if mine.is_sliding:
        mine.cumulative_length = length


@dataclass(frozen=True)
class _PassPart:
    """What a pass does with the rows of one part.

    Attributes:
        rows: The rows in the batch.
        cache: Their cache.
        step: Their tokens before and after the pass.
    """

    rows: slice
    cache: Any
    step: ForwardPass

    @property
    def sees_all(self) -> bool:
        """Whether each row has one new token, which sees all columns of its part."""
        return all(
            n == self.step.columns == m + 1
            for m, n in zip(self.step.before, self.step.after, strict=True)
        )


class PartedKeys:
    """The keys and values of the parts after an update; stands for keys and for values.

    Attributes:
        parts: Each part with its keys and values as its own cache returns them.
    """

    def __init__(self, parts: Sequence[tuple[_PassPart, Any, Any]]) -> None:
        self.parts = parts

    def attend(
        self,
        attention: Callable[..., tuple[torch.Tensor, Any]],
        module: Any,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of all rows, one part after another, (B, N, Q, D) -> (B, Q, N, D)."""
        outputs = []
        for part, keys, values in self.parts:
            own = None
            if mask is not None and isinstance(keys, torch.Tensor) and not part.sees_all:
                own = mask if len(mask) == 1 else mask[part.rows]
                own = own[..., -keys.shape[-2] :]  # columns of longer parts are on the left
            outputs.append(attention(module, query[part.rows], keys, values, own, **kwargs)[0])
        return torch.cat(outputs)


class PartedCache(DynamicCache):
    """The caches of several parts, as a model sees them in one pass: with all columns.

    Args:
        caches: The cache of each part.
        lengths: Tokens of each row of each part after the pass.
        new: Tokens of each row in the pass, padding included.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[list[int]], new: int) -> None:
        super().__init__()
        self.layers = max(caches, key=lambda cache: int(cache.get_seq_length())).layers
        self._parts, first = [], 0
        for cache, after in zip(caches, lengths, strict=True):
            step = ForwardPass([max(0, count - new) for count in after], after, max(after))
            self._parts.append(_PassPart(slice(first, first + len(after)), cache, step))
            first += len(after)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Add new columns, (B, K, Q, D) each, to each part; returns `PartedKeys` twice."""
        before, parts = current_step(), []
        try:
            for part in self._parts:
                set_current_step(part.step)
                states = key_states[part.rows], value_states[part.rows]
                parts.append((part, *part.cache.update(*states, layer_idx, *args, **kwargs)))
        finally:
            set_current_step(before)
        keys = PartedKeys(parts)
        return keys, keys

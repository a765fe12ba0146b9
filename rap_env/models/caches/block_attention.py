"""Attention of several new tokens of rows over a cache that is stored in groups.

Shapes: b rows with equal positions, K key and value heads, R query heads for each of them, S
queries, D channels of a head, P groups of a piece.
"""

from __future__ import annotations

import torch

from rap_env.levels import GROUP_TOKENS, SINK_GROUPS, CacheLevel
from rap_env.models.caches.groups import PIECE_VALUES, Bundle, capped, split, visible_groups, widen

_BLOCK_GROUPS = 8
"""Groups of a block of queries."""


class BlockAttention:
    """Attention of several new tokens of rows with equal positions.

    Queries are padded to whole groups, from the start of the bundle's keys on: (b, K, R, S,
    D).
    """

    def __init__(
        self,
        query: torch.Tensor,
        bundle: Bundle,
        level: CacheLevel,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> None:
        self.bundle, self.level = bundle, level
        self.scale, self.softcap, self.window = scale, softcap, window
        self.front = bundle.keys.shape[2] - bundle.new  # tokens of the tail
        back = -bundle.keys.shape[2] % GROUP_TOKENS
        self.count = (bundle.keys.shape[2] + back) // GROUP_TOKENS
        pad = torch.nn.functional.pad
        self.query = pad(query, (0, 0, self.front, back)) if self.front or back else query
        self.keys, self.values = (
            pad(t, (0, 0, 0, back)) if back else t for t in (bundle.keys, bundle.values)
        )

    def attend(self) -> torch.Tensor:
        """(b, K, R, Q, D)."""
        self._own_groups()
        for first in range(0, self.count, _BLOCK_GROUPS):
            end = min(first + _BLOCK_GROUPS, self.count)
            self._stored_groups(first, end)
            self._later_groups(first, end)
        attended = self.output[:, :, :, self.front : self.front + self.bundle.new]
        return attended.to(self.query.dtype)

    def _own_groups(self) -> None:
        """Each token with its own group: the groups are the batch of one call."""
        b, heads, each, tokens, size = self.query.shape
        query = split(self.query, 3, self.count, -1).permute(0, 3, 1, 2, 4, 5)
        keys, values = (
            split(t, 2, self.count, -1).transpose(1, 2).flatten(0, 1)
            for t in (self.keys, self.values)
        )
        place = torch.arange(GROUP_TOKENS, device=keys.device)
        seen = place[:, None] >= place
        if self.window is not None:
            seen &= place[:, None] - place < self.window
        output, lse = self._part(query.flatten(0, 1), keys, values, seen)
        self.output = (
            split(output, 0, b, self.count)
            .permute(0, 2, 3, 1, 4, 5)
            .reshape(b, heads, each, tokens, size)
            .float()
        )
        self.lse = (
            split(lse, 0, b, self.count).permute(0, 2, 3, 1, 4).reshape(b, heads, each, tokens)
        )

    def _stored_groups(self, first: int, end: int) -> None:
        """A block of queries with groups from before the chunk, all of which precede it."""
        bundle = self.bundle
        if bundle.groups is None or not any(group >= 0 for group in bundle.slots):
            return
        used = [slot for slot, group in enumerate(bundle.slots) if group >= 0]
        b, heads, _, _, size = self.query.shape
        width = max(1, PIECE_VALUES // (b * heads * GROUP_TOKENS * size))
        for start in range(0, used[-1] + 1, width):
            stop = min(start + width, used[-1] + 1)
            groups = torch.tensor(bundle.slots[start:stop], device=self.query.device)
            seen = self._seen(first, end, groups)
            if seen is not None and not bool(seen.any()):
                continue
            piece = tuple(
                (t if bundle.rows is None else t[bundle.rows])[:, :, start:stop]
                for t in bundle.groups
            )
            keys, values = widen(self.level.bits, piece, self.query.dtype)
            self._merge(first, end, keys.flatten(2, 3), values.flatten(2, 3), seen)

    def _later_groups(self, first: int, end: int) -> None:
        """A block of queries with the chunk's own complete groups before each of them."""
        keys, values = self.bundle.later
        done = min(keys.shape[2], end - 1)
        base = self.bundle.first_group
        full = min(first, done)
        if self.level.window_tokens is None and self.window is None:
            if full:
                self._merge(first, end, *_as_tokens(keys, values, 0, full), None)
            ranges = [(full, done)]
        else:
            begin = self._first_seen(first)
            ranges = [(begin, done)]
            if begin > 0 and base == 0 and self.level.window_tokens is not None:
                ranges.insert(0, (0, min(SINK_GROUPS, begin)))
        for start, stop in ranges:
            if stop <= start:
                continue
            groups = torch.arange(base + start, base + stop, device=self.query.device)
            seen = self._seen(first, end, groups)
            if seen is None or bool(seen.any()):
                self._merge(first, end, *_as_tokens(keys, values, start, stop), seen)

    def _first_seen(self, first: int) -> int:
        """The first of the chunk's groups that a block's first query may see, sinks apart."""
        begin, base = 0, self.bundle.first_group
        if self.level.window_tokens is not None:
            begin = max(begin, first - self.level.window_tokens // GROUP_TOKENS)
        if self.window is not None:
            position = (base + first) * GROUP_TOKENS - self.window + 1
            begin = max(begin, position // GROUP_TOKENS - base)
        return begin

    def _seen(self, first: int, end: int, groups: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of groups the queries of a block see, (tokens, P * 32); None for all."""
        base, device = self.bundle.first_group, self.query.device
        own = torch.arange(base + first, base + end, device=device)
        seen = visible_groups(self.level, own[:, None], groups)  # (groups, P)
        seen = seen.repeat_interleave(GROUP_TOKENS, 0).repeat_interleave(GROUP_TOKENS, 1)
        if self.window is not None:
            within = torch.arange(GROUP_TOKENS, device=device)
            query = (own[:, None] * GROUP_TOKENS + within).flatten()
            key = (groups[:, None] * GROUP_TOKENS + within).flatten()
            seen = seen & (key > query[:, None] - self.window)
        return None if bool(seen.all()) else seen

    def _merge(
        self,
        first: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
    ) -> None:
        """Merge a block's attention to some keys, (b, K, tokens, D)."""
        span = slice(first * GROUP_TOKENS, end * GROUP_TOKENS)
        output, lse = self._part(self.query[:, :, :, span], keys, values, seen)
        mine, total = self.output[:, :, :, span], self.lse[:, :, :, span]
        both = torch.logaddexp(total, lse)
        mine.mul_((total - both).exp_()[..., None])
        mine.addcmul_(output, (lse - both).exp_()[..., None])
        total.copy_(both)

    def _part(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of (b, K, R, S, D) to keys (b, K, t, D), with log-sum-exp (b, K, R, S).

        Hidden scores are the lowest finite number: a query that sees none of these keys gets
        a log-sum-exp of about that, and so no weight.
        """
        each, tokens = query.shape[2:4]
        if query.device.type != "cpu" or self.softcap is not None:
            scores = query.float().flatten(2, 3) @ keys.float().transpose(-1, -2)
            scores = split(scores.mul_(self.scale), 2, each, tokens)
            if self.softcap is not None:
                scores = capped(scores, self.softcap)
            if seen is not None:
                scores.masked_fill_(~seen, torch.finfo(torch.float32).min)
            lse = scores.logsumexp(dim=-1)
            weights = scores.sub_(lse[..., None]).exp_().flatten(2, 3)
            return split(weights @ values.float(), 2, each, tokens), lse
        mask = None
        if seen is not None:
            mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill_(~seen, torch.finfo(query.dtype).min).repeat(each, 1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.flatten(2, 3), keys, values, attn_mask=mask, scale=self.scale
        )
        return split(output, 2, each, tokens), split(lse, 2, each, tokens)


def _as_tokens(
    keys: torch.Tensor, values: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return keys[:, :, start:end].flatten(2, 3), values[:, :, start:end].flatten(2, 3)

"""Attention of new tokens over a cache that is stored in groups.

Shapes: B sequences (rows), b of them with equal positions, K key and value heads, R query heads
for each of them (N = K R), Q queries of a row, S queries padded to whole groups, D channels of a
head, C groups of channels, P groups of a piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch

from rap_env.levels import (
    ATTENTION_WORKSPACE_BYTES,
    GROUP_TOKENS,
    SINK_GROUPS,
    CacheLevel,
    channel_groups,
)
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import (
    PIECE_VALUES,
    Bundle,
    Chunk,
    ForwardPass,
    PackedPart,
    capped,
    codes_of,
    parts,
    split,
    visible_groups,
    widen,
)
from rap_env.models.device import send

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


_UNPACKED_BYTES = ATTENTION_WORKSPACE_BYTES * 3 // 4
"""Bytes of a piece's unpacked codes, in uint8 and in the dtype of products. Scores have the
rest.

Large pieces are fast: of 8 x 2048 tokens in int4, a step takes 1.5 times that of a native
cache with pieces of a quarter, and 1.1 times with these.
"""

_BUFFERS = threading.local()


def _buffer(name: str, values: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread that is used again for each piece, (values,)."""
    key = (name, like.device, dtype)
    buffers: dict[object, torch.Tensor] = _BUFFERS.__dict__.setdefault("buffers", {})
    if key not in buffers or buffers[key].numel() < values:
        with torch.inference_mode(False):
            buffers[key] = torch.empty(max(values, PIECE_VALUES), dtype=dtype, device=like.device)
    return buffers[key][:values]


class TokenAttention:
    """Attention of one new token of each row."""

    def __init__(
        self,
        query: torch.Tensor,
        layer: GroupedLayer,
        step: ForwardPass,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> None:
        batch, _, _, size = query.shape
        self.heads = layer.keys.shape[1]
        self.layer, self.step, self.softcap, self.window = layer, step, softcap, window
        self.query = query.view(batch, self.heads, -1, size).float() * scale  # (B, K, R, D)
        self.dtype, self.batch, self.size = query.dtype, batch, size
        # Codes are exact in bfloat16, and its products are twice as fast. Around zero: their
        # sums are rounded to 8 bits.
        fast = query.dtype == torch.bfloat16 and layer.level.bits < 16
        self.product = torch.bfloat16 if fast else torch.float32
        self.middle = 0 if layer.level.bits >= 8 else 1 << (layer.level.bits - 1)
        self.channels = channel_groups(size)

    def attend(self) -> torch.Tensor:
        """(B, 1, N, D)."""
        layer = self.layer
        tail, piece_masks = self._masks()
        scores = self._capped(self.query @ layer.keys.float().transpose(-1, -2))
        scores += tail
        self.most = scores.amax(dim=-1, keepdim=True)  # (B, K, R, 1)
        scores.sub_(self.most).exp_()
        self.sum = scores.sum(dim=-1, keepdim=True)
        self.output = scores @ layer.values.float()  # (B, K, R, D)
        keys, values = parts(layer.groups)
        for (start, end), mask in piece_masks:
            self._stretch(keys.narrow(start, end), values.narrow(start, end), mask)
        attended: torch.Tensor = (self.output / self.sum).to(self.dtype)
        return attended.view(self.batch, 1, -1, self.size)

    def _capped(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.softcap is None else capped(scores, self.softcap)

    def _masks(self) -> tuple[torch.Tensor, list[tuple[tuple[int, int], torch.Tensor | None]]]:
        """What to add to scores of the tail (B, 1, 1, 32), and of stretches of groups.

        A stretch that all rows see as a whole needs no mask; one that no row sees is left
        out. They are made on the CPU, so that nothing waits for a GPU to tell which is which.
        """
        layer, level = self.layer, self.layer.level
        device = layer.keys.device
        key = (device, level, layer.sliding_window, self.window, layer.capacity)
        if key in self.step.memo:
            masks: tuple[torch.Tensor, list[tuple[tuple[int, int], torch.Tensor | None]]]
            masks = self.step.memo[key]
            return masks
        last = torch.tensor(self.step.after)[:, None, None] - 1  # (B, 1, 1)
        own = last // GROUP_TOKENS
        within = torch.arange(GROUP_TOKENS)
        position = own * GROUP_TOKENS + within  # (B, 1, 32)
        tail = _hidden((position <= last) & self._in_window(last, position), device)[:, None]
        stretches: list[tuple[tuple[int, int], torch.Tensor | None]] = []
        groups = layer.slot_groups()[:, :, None]  # (B, G, 1)
        seen = visible_groups(level, own, groups)
        if self.window is not None:
            seen = seen & self._in_window(last, groups * GROUP_TOKENS + within)
        for start, end in self._stretches():
            part = seen[:, start:end]
            if bool(part.all()):
                stretches.append(((start, end), None))
            elif bool(part.any()):
                stretches.append(((start, end), _hidden(part, device)[:, None, None]))
        self.step.memo[key] = (tail, stretches)
        return tail, stretches

    def _in_window(self, last: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if self.window is None:
            return torch.ones_like(position, dtype=torch.bool)
        return position > last - self.window

    def _stretches(self) -> Iterator[tuple[int, int]]:
        scores = self.query.shape[0] * self.query.shape[1] * self.query.shape[2] * GROUP_TOKENS
        count = max(1, PIECE_VALUES // scores)
        for start in range(0, self.layer.capacity, count):
            yield start, min(start + count, self.layer.capacity)

    def _stretch(self, keys: PackedPart, values: PackedPart, mask: torch.Tensor | None) -> None:
        """Merge the attention to some groups; codes are unpacked in smaller pieces."""
        batch, heads, each, size = self.query.shape
        count = keys.codes.shape[2]
        scores = self.query.new_empty(batch, heads, each, count, GROUP_TOKENS)
        keys, values = (
            # Operations on mixed dtypes are slow.
            PackedPart(t.codes, *(None if s is None else s.float() for s in t[1:]))
            for t in (keys, values)
        )
        for part in (keys, values):
            if part.zero is not None and part.scale is not None:
                part.zero.add_(part.scale, alpha=self.middle)
        values_at_once = _UNPACKED_BYTES // (1 + self.product.itemsize)
        width = max(1, values_at_once // (batch * heads * GROUP_TOKENS * size))
        pieces = [(n, min(n + width, count)) for n in range(0, count, width)]
        for start, end in pieces:
            self._score(keys.narrow(start, end), scores[:, :, :, start:end])
        if keys.zero is not None:
            added = self.query @ keys.zero[:, :, :, 0].transpose(-1, -2)  # (B, K, R, P)
            scores += added[..., None]
        scores = self._capped(scores)
        if mask is not None:
            scores += mask
        flat = scores.flatten(3)  # (B, K, R, tokens)
        most = torch.maximum(self.most, flat.amax(dim=-1, keepdim=True))
        shrink = (self.most - most).exp_()
        self.most = most
        flat.sub_(most).exp_()
        self.sum = self.sum * shrink + flat.sum(dim=-1, keepdim=True)
        self.output *= shrink
        for start, end in pieces:
            self._add_values(values.narrow(start, end), scores[:, :, :, start:end])
        if values.zero is not None:
            zero = values.zero.transpose(2, 3).flatten(3)  # (B, K, C, tokens)
            added = flat @ zero.transpose(-1, -2)  # (B, K, R, C)
            split(self.output, -1, self.channels, -1).add_(added[..., None])

    def _score(self, keys: PackedPart, out: torch.Tensor) -> None:
        """Scores of the codes of a piece, into (B, K, R, P, 32)."""
        batch, heads, each, size = self.query.shape
        codes = self._codes(keys.codes)  # (B, K, P, 32, D)
        if keys.scale is None:
            scores = self.query @ codes.flatten(2, 3).transpose(-1, -2)  # (B, K, R, P 32)
            out.copy_(scores.view(out.shape))
            return
        folded = (self.query[:, :, None] * keys.scale).to(self.product)  # (B, K, P, R, D)
        scores = torch.bmm(
            folded.reshape(-1, each, size), codes.view(-1, GROUP_TOKENS, size).transpose(1, 2)
        )
        out.copy_(scores.view(batch, heads, -1, each, GROUP_TOKENS).transpose(2, 3))

    def _add_values(self, values: PackedPart, weights: torch.Tensor) -> None:
        """Add the values of a piece with weights (B, K, R, P, 32)."""
        codes = self._codes(values.codes).flatten(2, 3)  # (B, K, tokens, D)
        if values.scale is None:
            self.output += weights.flatten(3) @ codes
            return
        batch, heads, each, count, _ = weights.shape
        folded = weights.new_empty(batch, heads, self.channels, each, count, GROUP_TOKENS)
        scale = values.scale.transpose(2, 3)[:, :, :, None]  # (B, K, C, 1, P, 32)
        torch.mul(weights[:, :, None], scale, out=folded)
        added = folded.to(self.product).flatten(4).flatten(2, 3) @ codes  # (B, K, C R, D)
        added = added.view(batch, heads, self.channels, each, self.channels, -1)
        # Only the channels of the group whose scales were folded in: (B, K, R, D / C, C).
        added = added.diagonal(dim1=2, dim2=4)
        split(self.output, -1, self.channels, -1).add_(added.transpose(-1, -2))

    def _codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes of a piece around zero, (B, K, P, 32, D), in memory that the next piece reuses."""
        bits = self.layer.level.bits
        shape = (*packed.shape[:3], GROUP_TOKENS, packed.shape[-1])
        count = math.prod(shape)
        if bits < 8:
            codes = _buffer("codes", count, packed, torch.uint8).view(shape)
            packed = codes_of(bits, packed, codes).view(torch.int8).sub_(self.middle)
        return _buffer("piece", count, packed, self.product).view(shape).copy_(packed)


def _hidden(seen: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What to add to scores, on a device: 0 where a token is seen, else minus infinity."""
    return send(torch.zeros(seen.shape).masked_fill_(~seen, -math.inf), device)


def attend(
    query: torch.Tensor,
    chunk: Chunk,
    scaling: float | None,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of a chunk, (B, N, Q, D) -> (B, Q, N, D).

    Args:
        query: Queries of the chunk's columns.
        chunk: What the tokens see.
        scaling: Factor of the scores; by default ``D ** -0.5``.
        softcap: Scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        window: Tokens that the model's own attention sees, itself included, or None.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if chunk.token is not None:
        return TokenAttention(query, chunk.token, chunk.step, scale, softcap, window).attend()
    attended = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for bundle in chunk.bundles:
        heads = bundle.keys.shape[1]
        mine = query if bundle.rows is None else query[bundle.rows]
        mine = split(mine[:, :, -bundle.new :], 1, heads, -1)
        output = BlockAttention(mine, bundle, chunk.level, scale, softcap, window).attend()
        output = output.flatten(1, 2).transpose(1, 2)
        if bundle.rows is None:
            attended[:, -bundle.new :] = output
        else:
            attended[bundle.rows, -bundle.new :] = output
    return attended

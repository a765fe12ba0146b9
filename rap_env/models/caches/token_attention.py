"""Attention of one new token of each row over a cache that is stored in groups.

Shapes: B sequences (rows), K key and value heads, R query heads for each of them (N = K R), D
channels of a head, C groups of channels, P groups of a piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch

from rap_env.levels import ATTENTION_WORKSPACE_BYTES, GROUP_TOKENS, channel_groups
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import (
    PIECE_VALUES,
    ForwardPass,
    PackedPart,
    capped,
    codes_of,
    parts,
    split,
    visible_groups,
)
from rap_env.models.device import send

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

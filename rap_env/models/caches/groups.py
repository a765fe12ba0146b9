"""Stored groups of a KV cache, and what the new tokens of a pass see of them.

Shapes: ``...`` stands for sequences, key and value heads and groups; B sequences (rows), b of
them with equal positions, K key and value heads, D channels of a head, C groups of channels
(`channel_groups`), Q columns of a pass, T columns so far, G stored groups. A group has
`GROUP_TOKENS` tokens.

==========  =========================  ==========================  ============================
Part        16 bits                    8 bits                      4 and 2 bits
==========  =========================  ==========================  ============================
codes       (..., 32, D) unquantised   (..., 32, D) int8           (..., 32 / n, D) uint8
key scale   none                       (..., 1, D)                 (..., 1, D)
key zero    none                       none                        (..., 1, D)
value scale none                       (..., C, 32)                (..., C, 32)
value zero  none                       none                        (..., C, 32)
==========  =========================  ==========================  ============================

A byte holds n = 2 or 4 codes: those of tokens that are 32 / n apart, the first in the lowest
bits. So unpacking is a few operations on whole tensors. Scales and zeros are bfloat16, and
codes are rounded against the scales and zeros as stored. A value is ``code * scale + zero``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import (
    ATTENTION_WORKSPACE_BYTES,
    GROUP_TOKENS,
    SINK_GROUPS,
    CacheLevel,
    channel_groups,
)

Groups = tuple[torch.Tensor, ...]
"""Keys' codes, scale and zero, then those of values; only those that the level has."""


class PackedPart(NamedTuple):
    """The keys or the values of some groups."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def narrow(self, start: int, end: int) -> PackedPart:
        """The groups from `start` to `end`, dimension 2; views."""
        cut = [None if t is None else t[:, :, start:end] for t in self[1:]]
        return PackedPart(self.codes[:, :, start:end], *cut)


_PIECE_VALUES = 2**18
"""Numbers that are quantised together, so that they stay in the processor's cache."""


def pack(bits: int, keys: torch.Tensor, values: torch.Tensor) -> Groups:
    """Quantise and pack whole groups, (..., G, 32, D) each; some groups at a time."""
    if bits == 16:
        return keys.contiguous(), values.contiguous()
    count = keys.shape[-3]
    width = max(1, _PIECE_VALUES * count // max(1, keys.numel()))
    pieces = [
        _packed_piece(
            bits, *(t.narrow(-3, first, min(width, count - first)) for t in (keys, values))
        )
        for first in range(0, max(1, count), width)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return tuple(torch.cat(tensors, dim=-3) for tensors in zip(*pieces, strict=True))


def _packed_piece(bits: int, keys: torch.Tensor, values: torch.Tensor) -> Groups:
    codes, *scales = _quantised(bits, keys, -2)
    value_codes, *value_scales = _quantised(bits, _by_channels(values), -1)
    by_token = (scale.squeeze(-1).transpose(-1, -2).contiguous() for scale in value_scales)
    value_codes = value_codes.reshape(values.shape)
    return (_packed(bits, codes), *scales, _packed(bits, value_codes), *by_token)


def widen(bits: int, groups: Groups, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of stored groups, (..., 32, D) each."""
    if bits == 16:
        return groups[0], groups[1]
    keys, values = parts(groups)
    codes = codes_of(bits, keys.codes).float()
    wide_keys = _restored(codes, keys.scale, keys.zero).to(dtype)
    codes = codes_of(bits, values.codes).float()
    scales = (None if t is None else t.transpose(-1, -2)[..., None] for t in values[1:])
    wide_values = _restored(_by_channels(codes), *scales).to(dtype)
    return wide_keys, wide_values.reshape(codes.shape)


def _restored(
    codes: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of codes in float32, in their place: operations on mixed dtypes are slow."""
    if scale is not None:
        codes.mul_(scale.float())
    if zero is not None:
        codes.add_(zero.float())
    return codes


def parts(groups: Groups) -> tuple[PackedPart, PackedPart]:
    """The keys and the values of some groups."""
    half = len(groups) // 2
    return PackedPart(*groups[:half]), PackedPart(*groups[half:])


def codes_of(bits: int, packed: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes with a number each, (..., 32, D), uint8; 8 and 16 bits are returned as they are."""
    if bits >= 8:
        return packed
    each = 8 // bits
    *lead, rows, width = packed.shape
    if out is None:
        out = packed.new_empty((*lead, rows * each, width))
    for number in range(each):
        plane = out[..., number * rows : (number + 1) * rows, :]
        if number == each - 1:
            torch.bitwise_right_shift(packed, bits * number, out=plane)
            continue
        if number:
            torch.bitwise_right_shift(packed, bits * number, out=plane)
        torch.bitwise_and(plane if number else packed, (1 << bits) - 1, out=plane)
    return out


def _quantised(bits: int, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Codes (float32), scale and, below 8 bits, zero (bfloat16), over one dimension."""
    whole = x.float()
    low, high = whole.amin(dim, keepdim=True), whole.amax(dim, keepdim=True)
    if bits == 8:
        most = 127
        scale = (torch.maximum(-low, high) / most).to(torch.bfloat16)
        return (whole * _inverse(scale)).round_().clamp_(-most, most), scale
    most = (1 << bits) - 1
    scale = ((high - low) / most).to(torch.bfloat16)
    zero = low.to(torch.bfloat16)
    codes = whole - zero.float()
    return codes.mul_(_inverse(scale)).round_().clamp_(0, most), scale, zero


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, and 0 for 0, where all values are the same."""
    scale = scale.float()
    return torch.where(scale > 0, 1 / scale, 0)


def _packed(bits: int, codes: torch.Tensor) -> torch.Tensor:
    if bits == 8:
        return codes.to(torch.int8)
    each = 8 // bits
    rows = GROUP_TOKENS // each
    whole = codes.to(torch.int8).view(torch.uint8)  # faster than at once
    packed = whole[..., :rows, :].clone(memory_format=torch.contiguous_format)
    for number in range(1, each):
        packed |= whole[..., number * rows : (number + 1) * rows, :] << (bits * number)
    return packed


def _by_channels(values: torch.Tensor) -> torch.Tensor:
    """Channels in their groups, (..., D) -> (..., C, D / C)."""
    return split(values, -1, channel_groups(values.shape[-1]), -1)


def split(tensor: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """A dimension as several, of these sizes; a view."""
    view: torch.Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return view


PIECE_VALUES = ATTENTION_WORKSPACE_BYTES // 16
"""Numbers of a piece of keys or values: float32, and as much again for codes and scores."""


@dataclass
class ForwardPass:
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
    def of(cls, batch: int, queries: int, cached: int, mask: torch.Tensor | None) -> ForwardPass:
        """The step of a pass with a padding mask (B, T), or without padding."""
        columns = cached + queries
        if mask is None or mask.shape != (batch, columns):
            return cls([cached] * batch, [columns] * batch, columns)
        real = mask.bool()
        pads = (~real).long().cumprod(dim=1).sum(dim=1)
        whole = torch.arange(columns, device=mask.device) >= pads[:, None]
        if cached and not torch.equal(real, whole):
            raise UnsupportedCacheError(
                "A quantised or windowed KV cache needs all padding on the left; this attention "
                "mask has some between or after the tokens. Set padding_side='left'."
            )
        after = [columns - pad for pad in pads.tolist()]
        return cls([max(0, count - queries) for count in after], after, columns)


class _Current(threading.local):
    """This thread's forward pass, and the padding mask that the model was given."""

    step: ForwardPass | None = None
    mask: Any = None


CURRENT = _Current()
"""Set by the hooks of `rap_env.models.caches.attention`."""


@dataclass(frozen=True)
class Bundle:
    """Rows of a chunk with equal numbers of earlier and of new tokens.

    Attributes:
        rows: Their indices, or None for all rows.
        before: Tokens before the chunk.
        new: New tokens: the last ones of the chunk's columns.
        keys: Unquantised keys from the start of the group that token `before` - 1 is in, or
            of token 0: (b, K, tail + new, D).
        values: The same of values.
        groups: Stored groups of the tokens before, of all rows of the layer; None without
            any.
        slots: The group in each slot of `groups`, -1 for none, in order of slots.
        later: The keys and values of complete groups of `keys` and `values` as they are
            stored, (b, K, F, 32, D) each.
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
    step: ForwardPass
    bundles: tuple[Bundle, ...] = ()
    token: Any = None


def in_groups(states: torch.Tensor, count: int) -> torch.Tensor:
    """The first groups of keys or values, (B, K, tokens, D) -> (B, K, count, 32, D)."""
    return split(states[:, :, : count * GROUP_TOKENS], 2, count, GROUP_TOKENS)


def equal_rows(before: Sequence[int], after: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Rows with new tokens, by their numbers of tokens before and after."""
    rows_by_length: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(before, after, strict=True)):
        if pair[1] > pair[0]:
            rows_by_length.setdefault(pair, []).append(row)
    return rows_by_length


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

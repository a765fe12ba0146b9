"""Stored groups of a KV cache: quantised keys and values with their scales and zeros.

Shapes: ``...`` stands for sequences, key and value heads and groups; D channels of a head, C groups
of channels (`channel_groups`). A group has `GROUP_TOKENS` tokens.

==========  =========================  ==========================  ============================
Part        16 bits                    8 bits                      4 and 2 bits
==========  =========================  ==========================  ============================
codes       (..., 32, D) unquantised   (..., 32, D) int8           (..., 32 / n, D) uint8
key scale   none                       (..., 1, D)                 (..., 1, D)
key zero    none                       none                        (..., 1, D)
value scale none                       (..., 32, C)                (..., 32, C)
value zero  none                       none                        (..., 32, C)
==========  =========================  ==========================  ============================

A byte holds n = 2 or 4 codes: those of tokens that are 32 / n apart, the first in the lowest bits.
So unpacking is a few operations on whole tensors. Scales and zeros are bfloat16, and codes are
rounded against the scales and zeros as stored. A value is ``code * scale + zero``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rap_env.levels import GROUP_TOKENS, channel_groups

Groups = tuple[torch.Tensor, ...]
"""Keys' codes, scale and zero, then those of values; only those that the level has."""


class Part(NamedTuple):
    """The keys or the values of some groups."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def narrow(self, start: int, end: int) -> Part:
        """The groups from `start` to `end`, dimension 2; views."""
        cut = [None if t is None else t[:, :, start:end] for t in self[1:]]
        return Part(self.codes[:, :, start:end], *cut)


def pack(bits: int, keys: torch.Tensor, values: torch.Tensor) -> Groups:
    """Quantise and pack whole groups, (..., 32, D) each."""
    if bits == 16:
        return keys.contiguous(), values.contiguous()
    found: list[torch.Tensor] = []
    for codes, *scales in (_quantised(bits, keys, -2), _quantised(bits, _by_channels(values), -1)):
        found.append(_packed(bits, codes.reshape(keys.shape)))
        found.extend(scale.squeeze(-1) if codes.dim() > keys.dim() else scale for scale in scales)
    return tuple(found)


def rounded(
    bits: int, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as `widen` returns them after `pack`, without the packing."""
    if bits == 16:
        return keys, values
    found = []
    for part, dim in ((keys, -2), (_by_channels(values), -1)):
        codes, scale, *zero = _quantised(bits, part, dim)
        codes.mul_(scale)
        if zero:
            codes.add_(zero[0])
        found.append(codes.to(keys.dtype).reshape(keys.shape))
    return found[0], found[1]


def widen(bits: int, groups: Groups, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of stored groups, (..., 32, D) each."""
    if bits == 16:
        return groups[0], groups[1]
    keys, values = parts(groups)
    found = []
    for part, by_channels in ((keys, False), (values, True)):
        codes = codes_of(bits, part.codes).float()
        shape = codes.shape
        scale, zero = part.scale, part.zero
        if by_channels:
            codes = _by_channels(codes)
            scale = None if scale is None else scale.unsqueeze(-1)
            zero = None if zero is None else zero.unsqueeze(-1)
        if scale is not None:
            codes.mul_(scale)
        if zero is not None:
            codes.add_(zero)
        found.append(codes.to(dtype).reshape(shape))
    return found[0], found[1]


def parts(groups: Groups) -> tuple[Part, Part]:
    """The keys and the values of some groups."""
    half = len(groups) // 2
    return Part(*groups[:half]), Part(*groups[half:])


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
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    low, high = low.float(), high.float()
    if bits == 8:
        most = 127
        scale = (torch.maximum(-low, high) / most).to(torch.bfloat16)
        return (x * _inverse(scale)).round_().clamp_(-most, most), scale
    most = (1 << bits) - 1
    scale = ((high - low) / most).to(torch.bfloat16)
    zero = low.to(torch.bfloat16)
    codes = x - zero.float()  # float32, also of half precision
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
    whole = codes.to(torch.uint8)
    packed = whole[..., :rows, :].clone(memory_format=torch.contiguous_format)
    for number in range(1, each):
        packed |= whole[..., number * rows : (number + 1) * rows, :] << (bits * number)
    return packed


def _by_channels(values: torch.Tensor) -> torch.Tensor:
    """Channels in their groups, (..., D) -> (..., C, D / C)."""
    return split(values, -1, channel_groups(values.shape[-1]), -1)


def split(tensor: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """A dimension as several, of these sizes; a view."""
    found: torch.Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return found

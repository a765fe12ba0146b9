"""The layout of packed codes, and the memory that weights are widened into.

A matrix (out, in) of int4 codes is in blocks of 64 rows, or in pairs of inputs; see
`models.weights.packing`.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn import functional

PackedLevel = Literal["int8", "int4", "int4-compact", "int3", "int2"]
PACKED_LEVELS: tuple[PackedLevel, ...] = get_args(PackedLevel)
"""Levels of packed weights, from the most to the least exact one."""

GROUP_INPUTS = 32
"""Inputs that share a scale and a zero at int4."""

SCALE_DTYPE = torch.bfloat16
"""Dtype in which scales and zeros are stored, whatever the model computes in."""

PIECE_VALUES = 2**20
"""Weights that are widened at a time, at most, unless one block of 64 rows has more."""

BLOCK = 64  # rows of a block
HALF = BLOCK // 2
MIDDLE = 8  # the int4 code that stands for the zero itself

LARGEST_SCALE = 255
"""Scales are whole multiples, up to this one, of their row's factor."""


@dataclass(frozen=True)
class LowBitFormat:
    """How a level stores codes, scales and zeros.

    Attributes:
        bits: Bits of a code.
        group_inputs: Inputs that share a scale and a zero.
        zero_bits: Bits of a zero, 4 or 8.
        zero_step: Difference of two zeros, in units of a scale.
    """

    bits: int
    group_inputs: int
    zero_bits: int
    zero_step: float

    @property
    def lift(self) -> int:
        """What a code is multiplied by, so that it is at the top of a half byte."""
        return int(2 ** (4 - self.bits))

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a matrix (out, in)."""
        out, inputs = shape
        groups = inputs // self.group_inputs
        return {
            "codes": (out // BLOCK, inputs * self.bits // 4, HALF),
            "scales": (groups, out),
            "zeros": (groups * self.zero_bits // 8, out),
            "factors": (out,),
        }

    def factors(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The factor of each row, (out,), for groups with these ends of their ranges.

        Args:
            low: Least weights, (out, groups).
            high: Greatest weights, (out, groups).
        """
        scale = self._positive((high - low) / (2**self.bits - 1), high)
        least = torch.finfo(torch.float32).tiny * LARGEST_SCALE * self.lift
        most = scale.amax(dim=1).clamp_min(least)
        return (most / (LARGEST_SCALE * self.lift)).to(SCALE_DTYPE).float()

    def rounded(
        self, scale: torch.Tensor, zero: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros as a matrix stores them; all of shapes that broadcast."""
        steps, zeros = self.stored(scale, zero, factors)
        return steps * self.lift * factors, self._zero_values(steps, zeros) * factors

    def stored(
        self, scale: torch.Tensor, zero: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole numbers that stand for scales and for zeros, as floats."""
        scale = self._positive(scale, zero)
        steps = (scale / (factors * self.lift)).round_().clamp_(1, LARGEST_SCALE)
        most = 2 ** (self.zero_bits - 1)
        zeros = (zero / (steps * factors * self.zero_step)).round_().clamp_(-most, most - 1)
        return steps, zeros + most

    def _positive(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Scales, with one that can express the zero where all weights of a group are equal."""
        reach = self.zero_step * (2 ** (self.zero_bits - 1) - 1) / self.lift
        return torch.where(scale == 0, zero.abs() / reach, scale)

    def kernel_scales(
        self, scales: torch.Tensor, zeros: torch.Tensor, memory: ScaleMemory | None = None
    ) -> torch.Tensor:
        """Scale and zero of lifted codes in units of the factor, (groups, rows, 2), bfloat16.

        Args:
            scales: (groups, rows), uint8.
            zeros: (groups, rows) or half as many groups, uint8.
            memory: Where they are computed and returned; by default in new memory.
        """
        memory = memory or ScaleMemory(scales.new_empty(3, *scales.shape, dtype=torch.int32))
        steps = memory.steps.copy_(scales)
        if self.zero_bits == 4:
            first, second = memory.halves
            torch.bitwise_and(zeros, _LOWER_BITS, out=first)
            torch.bitwise_right_shift(zeros, _FOUR, out=second)
            zeros = memory.unpacked
        self._zero_values(steps, memory.zeros.copy_(zeros), memory.values)
        # Both numbers of a pair are written at once, as one of 32 bits: torch computes one
        # value at a time where it would have to write every second one. Scales are whole
        # numbers to 255, and so exact.
        memory.pairs.bitwise_or_(memory.bits.bitwise_right_shift_(_SIXTEEN))
        return memory.result

    def _zero_values(
        self, steps: torch.Tensor, zeros: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = torch.mul(steps, -(2 ** (self.zero_bits - 1)) * self.zero_step, out=out)
        return upper_half(values.addcmul_(zeros, steps, value=self.zero_step))


class ScaleMemory:
    """Memory of `LowBitFormat.kernel_scales`, and the parts of it that operations write to.

    Args:
        numbers: (3, groups, rows), int32.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self.bits, _, self.pairs = numbers.unbind()
        self.steps, self.zeros, self.values = numbers.view(torch.float32).unbind()
        groups, rows = self.bits.shape
        self.unpacked = self.pairs.view(torch.uint8).view(-1)[: groups * rows].view(groups, rows)
        self.halves = self.unpacked.chunk(2)
        self.result = self.pairs.view(SCALE_DTYPE).view(groups, rows, 2)


# An operation on a tensor and a number makes a tensor of the number, which takes longer.
_LOWER_BITS, _FOUR = (torch.tensor(number, dtype=torch.uint8) for number in (15, 4))
_SIXTEEN, _UPPER_HALF = (torch.tensor(number, dtype=torch.int32) for number in (16, -(2**16)))


def upper_half(values: torch.Tensor) -> torch.Tensor:
    """Values rounded toward zero to bfloat16, in place; contiguous float32."""
    values.view(torch.int32).bitwise_and_(_UPPER_HALF)
    return values


LOW_BIT_FORMATS: dict[PackedLevel, LowBitFormat] = {
    "int4-compact": LowBitFormat(4, 32, zero_bits=8, zero_step=1 / 16),
    "int3": LowBitFormat(3, 32, zero_bits=4, zero_step=1 / 2),
    "int2": LowBitFormat(2, 16, zero_bits=4, zero_step=1.0),
}
"""The formats by level."""


_buffers: dict[tuple[torch.device, torch.dtype, str], torch.Tensor] = {}
_buffer_lock = threading.RLock()


def widening_buffer(
    values: int, dtype: torch.dtype, device: torch.device, use: str = "widen"
) -> torch.Tensor:
    """The process's buffer for widened weights, (values,); hold `buffer_in_use` while using it.

    Buffers of different uses are different memory.
    """
    key = (device, dtype, use)
    if key not in _buffers or len(_buffers[key]) < values:
        _buffers.pop(key, None)
        with torch.inference_mode(False):
            _buffers[key] = torch.empty(values, dtype=dtype, device=device)
    return _buffers[key][:values]


def buffer_bytes() -> int:
    """Bytes of the process's buffers for widened weights."""
    return sum(buffer.nbytes for buffer in list(_buffers.values()))


def buffer_in_use() -> threading.RLock:
    """The lock to hold while the buffer is in use."""
    return _buffer_lock


def _after_fork() -> None:
    global _buffer_lock
    _buffer_lock = threading.RLock()  # a thread of the parent may hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def stored_level(level: PackedLevel, shape: tuple[int, int]) -> PackedLevel:
    """The level at which a matrix (out, in) is stored where its block is at `level`."""
    fits_low_bits = shape[0] % BLOCK == 0 and shape[1] % (2 * GROUP_INPUTS) == 0
    return "int4" if level in LOW_BIT_FORMATS and not fits_low_bits else level


def tensor_shapes(level: PackedLevel, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a matrix (out, in); see `models.weights.packing` and `low_bits`."""
    level, (out, inputs) = stored_level(level, shape), shape
    if level in LOW_BIT_FORMATS:
        return LOW_BIT_FORMATS[level].shapes(shape)
    if level == "int8":
        return {"codes": (out, inputs), "scales": (out,)}
    groups = -(-inputs // GROUP_INPUTS)
    blocks = (out // BLOCK, inputs, HALF) if fills_blocks(shape) else (out, -(-inputs // 2))
    return {"codes": blocks, "scales": (groups, out, 2)}


def packed_bytes(level: PackedLevel, shape: tuple[int, int]) -> int:
    """Bytes of a matrix at a level, without making it."""
    sizes = {name: math.prod(part) for name, part in tensor_shapes(level, shape).items()}
    wide = "factors" if "factors" in sizes else "scales"  # the others are bytes
    return sum(sizes.values()) + sizes[wide] * (SCALE_DTYPE.itemsize - 1)


def fills_blocks(shape: tuple[int, int]) -> bool:
    """Whether an int4 matrix is stored in blocks of 64 rows, which torch's kernels need."""
    return shape[0] % BLOCK == 0 and shape[1] % GROUP_INPUTS == 0


def piece_rows(shape: tuple[int, int]) -> int:
    """Rows of a matrix that are widened at a time: all, or a multiple of 64."""
    out, inputs = shape
    return min(out, max(BLOCK, PIECE_VALUES // inputs // BLOCK * BLOCK))


def packed_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 of shape (out, in), in blocks or pairs."""
    out, inputs = codes.shape
    if fills_blocks((out, inputs)):
        return in_blocks_of(codes, BLOCK)
    codes = codes.to(torch.uint8)
    if inputs % 2:
        codes = functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def in_blocks_of(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Codes (out, in), in blocks of some rows, (blocks, in, rows / 2)."""
    halves = codes.to(torch.uint8).view(-1, 2, rows // 2, codes.shape[1])
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2).contiguous()


def unpaired(codes: torch.Tensor, inputs: int) -> torch.Tensor:
    """Codes with a number each, (rows, in / 2) to (rows, in)."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :inputs]


def widen_blocks(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    out: torch.Tensor,
    group_inputs: int = GROUP_INPUTS,
) -> None:
    """Codes (blocks, in, 32), scale and zero (groups, rows), into (in, rows).

    The codes become signed bytes of their distance from the middle, which convert to any dtype
    exactly.
    """
    blocks, inputs, _ = codes.shape
    halves = out.view(inputs, blocks, 2, HALF)
    with buffer_in_use():
        signed = widening_buffer(codes.numel(), torch.uint8, codes.device).view(codes.shape)
        torch.bitwise_right_shift(codes, 4, out=signed).sub_(MIDDLE)
        halves[:, :, 1].copy_(signed.view(torch.int8).transpose(0, 1))
        torch.bitwise_and(codes, 15, out=signed).sub_(MIDDLE)
        halves[:, :, 0].copy_(signed.view(torch.int8).transpose(0, 1))
    groups = out.view(-1, group_inputs, out.shape[1])
    # Contiguous: with other strides torch computes one value at a time.
    scale, zero = (part[:, None].to(out.dtype).contiguous() for part in (scale, zero))
    torch.addcmul(zero, groups, scale, out=groups)


def widen_pairs(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor
) -> None:
    """Codes (rows, in / 2), scale and zero (groups, rows), into (rows, in)."""
    inputs = out.shape[1]
    scale, zero = (by_input(part.to(out.dtype), inputs) for part in (scale, zero))
    centred = unpaired(codes, inputs).to(out.dtype).sub_(MIDDLE)
    torch.addcmul(zero, centred, scale, out=out)


def by_input(scale: torch.Tensor, inputs: int) -> torch.Tensor:
    """(groups, rows) to (rows, in)."""
    return scale.T.repeat_interleave(GROUP_INPUTS, dim=1)[:, :inputs]

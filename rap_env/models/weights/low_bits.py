"""Matrices of 4, 3 or 2 bits a weight whose scales take a byte or less.

A weight is ``factor * (scale * (lift * code - 8) + zero)``: its code has `bits` bits and is
multiplied by ``2**(4 - bits)``, the lift; a scale is a whole number to 255 and a zero a
multiple of the scale, both for a group of inputs; each row has a factor.

=============  ====  ======  =========  ===================================
Level          Bits  Group   Zero bits  Bits of a weight, with scales
=============  ====  ======  =========  ===================================
int4-compact   4     32      8          4.5 and 16 bits a row
int3           3     32      4          3.375 and 16 bits a row
int2           2     16      4          2.75 and 16 bits a row
=============  ====  ======  =========  ===================================

These weights have no kernels of their own. For each product the codes of a piece of the
matrix are unpacked to the layout of int4 codes (`models.weights.packing`) in a buffer that
all matrices use in turn, at the top of each half byte, and torch's int4 kernel or the
widening of int4 codes goes on from there. Unpacking is a few operations on whole bytes: bits
are laid out so that one ``and`` gives codes at the right place.

=====  ===========================================================================================
Bits   Bytes of 64 rows, (bytes, 32); half bytes are of rows r and 32 + r
=====  ===========================================================================================
4      the code of each input
2      codes of input i in the upper bits, of input ``inputs / 2 + i`` in the lower bits
3      codes of the first three quarters of the inputs in the upper bits; the lowest bits of the
       first, second and third quarter are the bits of a code of the fourth one
=====  ===========================================================================================

Matrices that do not fill blocks of 64 rows and groups of 64 inputs have none of these levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.models.weights.packing import (
    BLOCK,
    GROUP_INPUTS,
    HALF,
    MIDDLE,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    PackedMatrix,
    blocks_product,
    buffer_in_use,
    fills_blocks,
    piece_rows,
    widen_blocks,
    widening_buffer,
)

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
        values.addcmul_(zeros, steps, value=self.zero_step)
        values.view(torch.int32).bitwise_and_(_UPPER_HALF)  # rounds toward zero to bfloat16
        return values


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


LOW_BIT_FORMATS: dict[PackedLevel, LowBitFormat] = {
    "int4-compact": LowBitFormat(4, 32, zero_bits=8, zero_step=1 / 16),
    "int3": LowBitFormat(3, 32, zero_bits=4, zero_step=1 / 2),
    "int2": LowBitFormat(2, 16, zero_bits=4, zero_step=1.0),
}
"""The formats by level."""


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


@dataclass(frozen=True, eq=False)
class LowBitMatrix(PackedMatrix):
    """A matrix of weights at one of the levels of `LOW_BIT_FORMATS`. Make one with `pack`.

    Attributes:
        zeros: See `LowBitFormat`.
        factors: See there.
    """

    zeros: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def pack(
        cls,
        level: PackedLevel,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        factors: torch.Tensor,
    ) -> LowBitMatrix:
        """Pack given codes.

        Args:
            level: A level of `LOW_BIT_FORMATS`.
            codes: (out, in), whole numbers from 0.
            scale: (out, groups).
            zero: The weight of the middle code, (out, groups).
            factors: (out,).
        """
        form = LOW_BIT_FORMATS[level]
        steps, zeros = form.stored(scale.float(), zero.float(), factors.float()[:, None])
        zeros = zeros.to(torch.uint8).T
        if form.zero_bits == 4:
            first, second = zeros.chunk(2)
            zeros = first | (second << 4)
        out, inputs = codes.shape
        return cls(
            level,
            (out, inputs),
            _packed(codes, form.bits),
            steps.to(torch.uint8).T.contiguous(),
            zeros.contiguous(),
            factors.to(SCALE_DTYPE).contiguous(),
        )

    @property
    def _format(self) -> LowBitFormat:
        return LOW_BIT_FORMATS[self.level]

    def widen(self, out: torch.Tensor, first: int = 0) -> None:
        """Write the weights of some rows, rounded once to the dtype of `out`; see the base."""
        wide = torch.empty(out.shape[::-1], device=out.device).T
        self._widen_piece(wide, first)
        last = first + len(out)
        out.copy_(wide.mul_(self.factors[first:last, None].float()))

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights of single rows, as an embedding looks them up: (...) to (..., in)."""
        form, flat = self._format, indices.reshape(-1)
        zeros = self.zeros[:, flat]
        pairs = form.kernel_scales(self.scales[:, flat], zeros).float()
        scale, zero = (
            part.T.repeat_interleave(form.group_inputs, dim=1) for part in pairs.unbind(-1)
        )
        half_bytes = self.code_rows(flat)
        target = _Target(
            half_bytes.new_empty(len(flat), self.shape[1], 1),
            half_bytes.new_empty(len(flat), self.shape[1] // 4, 1),
            form.bits,
        )
        lifted = target.unpack(half_bytes[..., None])[..., 0]
        weights = torch.addcmul(zero, lifted.float() - MIDDLE, scale)
        weights *= self.factors[flat, None].float()
        return weights.to(dtype).view(*indices.shape, self.shape[1])

    def _by_kernel(self, flat: torch.Tensor) -> torch.Tensor:
        states, step, products = self._by_part(flat.contiguous()), piece_rows(self.shape), []
        with buffer_in_use():
            for first in range(0, self.shape[0], step):
                codes, scales = self._unpacked(first, min(first + step, self.shape[0]))
                parts = [
                    blocks_product(part, codes, scales[index :: len(states)].contiguous())
                    for index, part in enumerate(states)
                ]
                products.append(functools.reduce(torch.add, parts))
        output = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return output.mul_(self.factors)

    def _by_part(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The states, (rows, in), for each of the groups that share one of the kernel's groups."""
        count = GROUP_INPUTS // self._format.group_inputs
        if count == 1:
            return [flat]
        parts = flat.view(len(flat), -1, count, self._format.group_inputs)
        states = [torch.zeros_like(flat) for _ in range(count)]
        for index, part in enumerate(states):
            part.view(parts.shape)[:, :, index] = parts[:, :, index]
        return states

    def _widened_piece(
        self, buffer: torch.Tensor, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = buffer.view(self.shape[1], last - first).T
        if buffer.dtype == torch.float16:  # its range is too short without the factors
            self.widen(weights, first)
            return weights, None
        self._widen_piece(weights, first)
        return weights, self.factors[first:last]

    def _widen_piece(self, out: torch.Tensor, first: int) -> None:
        """Widen some rows without their factors into (rows, in), whose transpose is contiguous."""
        with buffer_in_use():
            codes, scales = self._unpacked(first, first + len(out))
            scale, zero = scales.unbind(-1)
            widen_blocks(codes, scale, zero, out.T, self._format.group_inputs)

    def _unpacked(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lifted int4 codes of some rows and their kernel scales, in the process's buffer."""
        form, codes, scales, zeros = self._format, self.codes, self.scales, self.zeros
        if last - first < self.shape[0]:
            codes = codes[first // BLOCK : last // BLOCK]
            scales, zeros = scales[:, first:last], zeros[:, first:last]
        target, memory = _buffered(self.level, last - first, self.shape[1], self.device)
        pairs = form.kernel_scales(scales, zeros, memory)
        return codes if form.bits == 4 else target.unpack(codes), pairs


class _Target:
    """Memory for unpacked codes, with the parts of it that are written one after the other.

    Making the parts anew for each product would take as long as writing them.

    Args:
        lifted: For codes, (blocks, in, n).
        low: For lowest bits of 3-bit codes, (blocks, in / 4, n).
        bits: Bits of a code.
    """

    def __init__(self, lifted: torch.Tensor, low: torch.Tensor, bits: int) -> None:
        self.lifted, self._low, self._bits = lifted, low, bits
        width = lifted.shape[1] * bits // 4
        self._first, self._last = lifted[:, :width], lifted[:, width:]

    def unpack(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes (blocks, bytes, n) to lifted codes (blocks, in, n); half bytes stay apart."""
        if self._bits == 4:
            return self.lifted.copy_(codes)
        if self._bits == 2:
            torch.bitwise_and(codes, _UPPER_2_BITS, out=self._first)
            torch.bitwise_left_shift(codes, _TWO, out=self._last).bitwise_and_(_UPPER_2_BITS)
            return self.lifted
        torch.bitwise_and(codes, _UPPER_3_BITS, out=self._first)
        first, *others = codes.chunk(3, dim=1)
        torch.bitwise_and(first, _LOWEST_BIT, out=self._last)
        for other in others:
            torch.bitwise_and(other, _LOWEST_BIT, out=self._low)
            torch.add(self._low, self._last, alpha=2, out=self._last)
        torch.add(self._last, self._last, out=self._last)
        return self.lifted


# Of both half bytes; tensors, as in `models.weights.packing`.
_UPPER_2_BITS, _UPPER_3_BITS, _LOWEST_BIT, _TWO = (
    torch.tensor(number, dtype=torch.uint8) for number in (0xCC, 0xEE, 0x11, 2)
)


_Parts = tuple[_Target, ScaleMemory]


_parts: dict[tuple[PackedLevel, int, int, torch.device], _Parts] = {}


def _buffered(level: PackedLevel, rows: int, inputs: int, device: torch.device) -> _Parts:
    """The parts for a piece of a matrix in the process's buffer, which must be in use."""
    key = level, rows, inputs, device
    if key not in _parts:
        form, codes = LOW_BIT_FORMATS[level], inputs * rows // 2
        sizes = [12 * (inputs // form.group_inputs) * rows, codes, codes // 4]
        buffer = widening_buffer(sum(sizes), torch.uint8, device, use="unpack")
        for known, (target, _) in list(_parts.items()):
            if target.lifted.untyped_storage().data_ptr() != buffer.data_ptr():
                del _parts[known]  # the buffer has grown
        with torch.inference_mode(False):  # the parts are written to in either mode
            numbers, lifted, low = torch.split(buffer, sizes)
            _parts[key] = (
                _Target(lifted.view(-1, inputs, HALF), low.view(-1, inputs // 4, HALF), form.bits),
                ScaleMemory(numbers.view(torch.int32).view(3, -1, rows)),
            )
    return _parts[key]


def matrix_from_tensors(
    level: PackedLevel, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
) -> PackedMatrix:
    """Rebuild a matrix of any packed level from its `tensors`.

    Raises:
        ArtifactError: The tensors do not belong to such a matrix.
    """
    if level not in PACKED_LEVELS:
        raise UnknownNameError("level of packed weights", level, PACKED_LEVELS)
    expected = tensor_shapes(level, shape)
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != expected:
        raise ArtifactError(
            f"A matrix of {shape[0]} x {shape[1]} weights at {level} has tensors of shapes "
            f"{expected}, not {given}."
        )
    level = stored_level(level, shape)
    kind = LowBitMatrix if level in LOW_BIT_FORMATS else PackedMatrix
    return kind(level, shape, **tensors)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (out, in), in blocks of 64 rows, (blocks, bytes, 32)."""
    halves = codes.to(torch.uint8).view(-1, 2, HALF, codes.shape[1])
    lifted = halves << (4 - bits)
    both = (lifted[:, 0] | (lifted[:, 1] << 4)).transpose(1, 2)
    if bits == 2:
        first, second = both.chunk(2, dim=1)
        both = first | (second >> 2)
    elif bits == 3:
        *parts, last = both.chunk(4, dim=1)
        both = torch.cat([part | ((last >> (3 - i)) & 0x11) for i, part in enumerate(parts)], dim=1)
    return both.contiguous()

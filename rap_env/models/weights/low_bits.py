"""Matrices of 4, 3 or 2 bits a weight whose scales take a byte or less.

A weight is ``factor * (scale * (code - middle) + zero)`` with a code of `bits` bits, whose middle
is ``2**(bits - 1)``; a scale of 1 to 255 and a zero for each group of inputs; and one factor for
each row. The zero is a multiple of the scale, of `zero_bits` bits.

=============  ====  ======  =========  ===================================
Level          Bits  Group   Zero bits  Bits of a weight, with scales
=============  ====  ======  =========  ===================================
int4-compact   4     32      8          4.5 and 16 bits a row
int3           3     32      4          3.375 and 16 bits a row
int2           2     16      4          2.75 and 16 bits a row
=============  ====  ======  =========  ===================================

These weights have no kernels of their own. For each product the codes of a piece of the matrix are
unpacked to the layout of int4 codes (`models.weights.packing`) in a buffer that all matrices use in
turn, at the top of each half byte, and torch's int4 kernel or the widening of int4 codes goes on
from there. A code in the upper bits of a half byte is a multiple of a power of two, so the scale is
divided by it. Unpacking is a few operations on whole bytes: bits are laid out so that one ``and``
gives codes at the right place.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rap_env.models.weights.packed_layout import (
    BLOCK,
    GROUP_INPUTS,
    HALF,
    LOW_BIT_FORMATS,
    MIDDLE,
    SCALE_DTYPE,
    LowBitFormat,
    PackedLevel,
    buffer_in_use,
    piece_rows,
    stored_level,
    widen_blocks,
    widening_buffer,
)
from rap_env.models.weights.packing import PackedMatrix


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

    @classmethod
    def joined(cls, parts: Sequence[PackedMatrix]) -> PackedMatrix:
        """The rows of several matrices of one level, one after the other."""
        rows = sum(part.shape[0] for part in parts)
        dims = {"codes": 0, "scales": 1, "zeros": 1, "factors": 0}
        tensors = {name: torch.cat([p.tensors[name] for p in parts], dims[name]) for name in dims}
        return cls(parts[0].level, (rows, parts[0].shape[1]), **tensors)

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
        block, row = flat // BLOCK, flat % BLOCK
        half_bytes = self.codes[block, :, row % HALF]
        half_bytes = torch.where((row < HALF)[:, None], half_bytes & 15, half_bytes >> 4)
        lifted = torch.empty(len(flat), self.shape[1], 1, dtype=torch.uint8, device=self.device)
        _unpack(half_bytes[..., None], form.bits, lifted)
        weights = torch.addcmul(zero, lifted[..., 0].float() - MIDDLE, scale)
        weights *= self.factors[flat, None].float()
        return weights.to(dtype).view(*indices.shape, self.shape[1])

    def _by_kernel(self, flat: torch.Tensor) -> torch.Tensor:
        output = flat.new_empty(len(flat), self.shape[0])
        groups = GROUP_INPUTS // self._format.group_inputs
        states = [flat]
        if groups > 1:  # the kernel's groups are longer: it sees one part of each at a time
            parts = flat.view(len(flat), -1, groups, self._format.group_inputs)
            states = [torch.zeros_like(flat) for _ in range(groups)]
            for index, part in enumerate(states):
                part.view(parts.shape)[:, :, index] = parts[:, :, index]
        step = piece_rows(self.shape)
        with buffer_in_use():
            for first in range(0, self.shape[0], step):
                last = min(first + step, self.shape[0])
                codes, scales = self._unpacked(first, last)
                shape = (last - first, self.shape[1])
                pieces = (
                    PackedMatrix("int4", shape, codes, scales[index::groups].contiguous())
                    for index in range(groups)
                )
                products = [p._by_kernel(s) for p, s in zip(pieces, states, strict=True)]
                output[:, first:last] = sum(products[1:], products[0])
        return output.mul_(self.factors)

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
        """Lifted int4 codes of some rows, in the process's buffer, and their kernel scales."""
        form, rows = self._format, slice(first, last)
        scales = form.kernel_scales(self.scales[:, rows], self.zeros[:, rows])
        codes = self.codes[first // BLOCK : last // BLOCK]
        if form.bits == 4:
            return codes, scales
        shape = (len(codes), self.shape[1], HALF)
        buffer = widening_buffer(math.prod(shape), torch.int8, self.device)
        lifted = buffer.view(torch.uint8).view(shape)
        _unpack(codes, form.bits, lifted)
        return lifted, scales


def matrix_from_tensors(
    level: PackedLevel, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
) -> PackedMatrix:
    """Rebuild a matrix of any packed level from its `tensors`.

    Raises:
        ArtifactError: The tensors do not belong to such a matrix.
    """
    level = stored_level(level, shape)
    kind = LowBitMatrix if level in LOW_BIT_FORMATS else PackedMatrix
    return kind.from_tensors(level, shape, tensors)


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


def _unpack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Bytes (blocks, bytes, n) to lifted int4 codes (blocks, in, n); half bytes stay apart."""
    if bits == 4:
        out.copy_(codes)
    elif bits == 2:
        first, second = out.chunk(2, dim=1)
        torch.bitwise_and(codes, 0xCC, out=first)
        torch.bitwise_left_shift(codes, 2, out=second).bitwise_and_(0xCC)
    else:
        quarter = out.shape[1] // 4
        torch.bitwise_and(codes, 0xEE, out=out[:, : 3 * quarter])
        last = out[:, 3 * quarter :]
        torch.bitwise_and(codes[:, :quarter], 0x11, out=last).bitwise_left_shift_(3)
        for number in (1, 2):
            bit = codes[:, number * quarter : (number + 1) * quarter] & 0x11
            last.bitwise_or_(bit.bitwise_left_shift_(3 - number))

"""Matrices of 4, 3 or 2 bits a weight whose scales take a byte or less.

A weight is ``factor * (scale * (lift * code - 8) + zero)``: its code has `bits` bits and is
multiplied by ``2**(4 - bits)``, the lift; a scale is a whole number to 255 and a zero a multiple of
the scale, both for a group of inputs; each row has a factor.

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
from there. Unpacking is a few operations on whole bytes: bits are laid out so that one ``and``
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
        target = _Target(
            half_bytes.new_empty(len(flat), self.shape[1], 1),
            half_bytes.new_empty(len(flat), 3 * self.shape[1] // 4, 1),
            form.bits,
        )
        lifted = target.unpack(half_bytes[..., None])[..., 0]
        weights = torch.addcmul(zero, lifted.float() - MIDDLE, scale)
        weights *= self.factors[flat, None].float()
        return weights.to(dtype).view(*indices.shape, self.shape[1])

    def _by_kernel(self, flat: torch.Tensor) -> torch.Tensor:
        states, step, products = self._by_part(flat), piece_rows(self.shape), []
        with buffer_in_use():
            for first in range(0, self.shape[0], step):
                last = min(first + step, self.shape[0])
                codes, scales = self._unpacked(first, last)
                shape = (last - first, self.shape[1])
                product, *others = (
                    PackedMatrix(
                        "int4", shape, codes, scales[index :: len(states)].contiguous()
                    )._by_kernel(part)
                    for index, part in enumerate(states)
                )
                for other in others:
                    product.add_(other)
                products.append(product)
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
        """Lifted int4 codes of some rows, in the process's buffer, and their kernel scales."""
        form, codes, scales, zeros = self._format, self.codes, self.scales, self.zeros
        if last - first < self.shape[0]:
            codes = codes[first // BLOCK : last // BLOCK]
            scales, zeros = scales[:, first:last], zeros[:, first:last]
        pairs = form.kernel_scales(scales, zeros)
        if form.bits == 4:
            return codes, pairs
        target = _buffered_target(last - first, self.shape[1], form.bits, self.device)
        return target.unpack(codes), pairs


class _Target:
    """Memory for unpacked codes, with the parts of it that are written one after the other.

    Making the parts anew for each product would take as long as writing them.

    Args:
        lifted: For codes, (blocks, in, n).
        low: For the lowest bits of 3-bit codes, (blocks, 3 / 4 in, n).
        bits: Bits of a code.
    """

    def __init__(self, lifted: torch.Tensor, low: torch.Tensor, bits: int) -> None:
        self.lifted, self._low, self._bits = lifted, low, bits
        width = lifted.shape[1] * bits // 4
        self._first, self._last = lifted[:, :width], lifted[:, width:]
        self._thirds = low.chunk(3, dim=1)

    def unpack(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes (blocks, bytes, n) to lifted codes (blocks, in, n); half bytes stay apart."""
        if self._bits == 4:
            return self.lifted.copy_(codes)
        if self._bits == 2:
            torch.bitwise_and(codes, 0xCC, out=self._first)
            torch.bitwise_left_shift(codes, 2, out=self._last).bitwise_and_(0xCC)
            return self.lifted
        torch.bitwise_and(codes, 0xEE, out=self._first)
        torch.bitwise_and(codes, 0x11, out=self._low)
        first, second, third = self._thirds
        torch.add(second, first, alpha=2, out=self._last)
        torch.add(third, self._last, alpha=2, out=self._last).bitwise_left_shift_(1)
        return self.lifted


_targets: dict[tuple[int, int, int, int], _Target] = {}


def _buffered_target(rows: int, inputs: int, bits: int, device: torch.device) -> _Target:
    """The target for a piece of a matrix in the process's buffer, which must be in use."""
    codes = rows * inputs // 2
    buffer = widening_buffer(2 * codes, torch.uint8, device, use="unpack")
    key = buffer.data_ptr(), rows, inputs, bits
    if key not in _targets:
        for stale in [known for known in _targets if known[0] != key[0]]:
            del _targets[stale]  # the buffer has grown
        lifted, low = buffer[:codes], buffer[codes : codes + codes * 3 // 4]
        _targets[key] = _Target(
            lifted.view(-1, inputs, HALF), low.view(-1, inputs * 3 // 4, HALF), bits
        )
    return _targets[key]


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

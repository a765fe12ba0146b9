"""Packed matrices: weights as codes of 8 or 4 bits with scales, and products with them.

=======  ==========================================  =============================================
Level    Codes                                       Scales (bfloat16)
=======  ==========================================  =============================================
int8     int8 (out, in)                              (out,)
int4     uint8, two codes of 0 to 15 a byte:         (in / 32, out, 2): scale and zero of each
         (out / 64, in, 32) in blocks of 64 rows,    group of 32 inputs;
         or (out, in / 2) in pairs of inputs         weight = (code - 8) * scale + zero
=======  ==========================================  =============================================

In a block, byte (n, i, r) has the code of row ``64 n + r`` and input i in its low bits, and
that of row ``64 n + 32 + r`` in its high bits. Torch's product on CPUs with AVX512 reads that
layout, that with AVX2 alone in two passes, and widening it needs no transposition within
bytes. Matrices whose sizes do not fill blocks are stored in pairs: the even input in the low
bits. The layout does not depend on the machine, so files can be moved between machines.

Products with few rows use torch's packed kernels where these apply. Those with many rows
widen the weights into one buffer that all matrices of the process use in turn, a piece at a
time, because unquantised products are faster per row.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch.nn import functional

from rap_env.models.device import TOKENS_AT_ONCE, choose_dtype, uses_float32

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


def by_input(scale: torch.Tensor, inputs: int) -> torch.Tensor:
    """(groups, rows) to (rows, in)."""
    return scale.T.repeat_interleave(GROUP_INPUTS, dim=1)[:, :inputs]


# Most rows of a product for which a packed kernel with bfloat16 states is faster than
# widening, measured with 1,536 x 576 weights and one thread of an AMD EPYC. Widening takes a
# constant time and little for each row, a kernel more for each row.
_KERNEL_ROWS = {"int4": 48, "int8": 8}
# AVX512: products of widened weights take longer.
_KERNEL_ROWS_EMULATED = {"int4": 128, "int8": 24}
_KERNEL_ROWS_AVX2 = {"int4": 8, "int8": 12}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of weights at int8 or int4. Make one with `from_codes` or `quantise`.

    Attributes:
        level: Its level.
        shape: (out, in): rows and inputs.
        codes: The codes, see the table above.
        scales: Their scales, see there.
    """

    level: PackedLevel
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> PackedMatrix:
        """Pack given codes: int4 with a zero, else int8.

        An int4 weight is ``(code - 8) * scale + zero``. Only the scale and the zero are
        rounded (to bfloat16).

        Args:
            codes: (out, in), integers; 0 to 15 at int4, -127 to 127 at int8.
            scale: At int4 (out, groups) with groups of 32 inputs, the last one possibly
                shorter; at int8 (out,).
            zero: At int4 (out, groups).
        """
        shape = (codes.shape[0], codes.shape[1])
        if zero is None:
            scales = scale.to(SCALE_DTYPE).contiguous()
            return cls("int8", shape, codes.to(torch.int8).contiguous(), scales)
        scales = torch.stack((scale.float().T, zero.float().T), dim=-1)
        return cls("int4", shape, packed_codes(codes), scales.to(SCALE_DTYPE).contiguous())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file stores, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def in_blocks(self) -> bool:
        """Whether its codes are int4 in blocks of 64 rows."""
        return self.codes.dim() > len(self.shape)

    def widen(self, out: torch.Tensor, first: int = 0) -> None:
        """Write the weights of some rows, rounded once to the dtype of `out`.

        Args:
            out: (rows, in): float32, bfloat16 or float16, on the matrix's device. Int4 blocks
                are widened fastest if its transpose is contiguous, all others if it is
                itself.
            first: First row, a multiple of 64.
        """
        rows = slice(first, first + len(out))
        codes = self.codes[rows]
        if self.level == "int8":
            out.copy_(codes).mul_(self.scales[rows, None])
            return
        scale, zero = self.scales[:, rows].unbind(-1)
        if not self.in_blocks:
            inputs = self.shape[1]
            scale, zero = (by_input(part.to(out.dtype), inputs) for part in (scale, zero))
            centred = unpaired(codes, inputs).to(out.dtype).sub_(MIDDLE)
            torch.addcmul(zero, centred, scale, out=out)
            return
        wide = out.T
        if out.dtype == torch.float16 or not wide.is_contiguous():  # its range is too short
            dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
            wide = torch.empty(wide.shape, dtype=dtype, device=out.device)
        blocks = slice(first // BLOCK, (first + len(out)) // BLOCK)
        widen_blocks(self.codes[blocks], scale, zero, wide)
        if wide.data_ptr() != out.data_ptr():
            out.copy_(wide.T)

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """All weights in a new tensor (out, in)."""
        with torch.inference_mode(False):
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
            self.widen_all(out)
        return out

    def widen_all(self, out: torch.Tensor) -> None:
        """Write all weights (out, in), some rows at a time, which stay in the CPU's cache."""
        for first in range(0, self.shape[0], piece_rows(self.shape)):
            self.widen(out[first : first + piece_rows(self.shape)], first)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights of single rows, as an embedding looks them up: (...) to (..., in)."""
        flat = indices.reshape(-1)
        if self.level == "int4":
            scale, zero = (by_input(s[:, flat], self.shape[1]) for s in self.scales.unbind(-1))
            codes = self.code_rows(flat).to(torch.float32)
            weights = torch.addcmul(zero.float(), codes - MIDDLE, scale.float())
        else:
            weights = self.codes[flat].float() * self.scales[flat, None].float()
        return weights.to(dtype).view(*indices.shape, self.shape[1])

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """``states @ weights.T``: (..., in) to (..., out), in the dtype of `states`."""
        out, inputs = self.shape
        flat = states.reshape(-1, inputs)
        output = self._by_kernel(flat) if self._kernel_applies(flat) else self._by_widening(flat)
        return output.view(*states.shape[:-1], out)

    def _kernel_applies(self, flat: torch.Tensor) -> bool:
        rows = flat.shape[0]  # len(flat) takes three times as long
        if not rows or not flat.is_cpu:
            return False
        if self.level == "int8":  # with other sizes torch's kernel reads beyond the matrix
            return self.shape[1] % GROUP_INPUTS == 0 and rows <= kernel_rows("int8", flat.dtype)
        readable = self.codes.dim() == 3 and kernel_block_rows()
        return bool(readable) and rows <= kernel_rows("int4", flat.dtype)

    def _by_kernel(self, flat: torch.Tensor) -> torch.Tensor:
        flat = flat.contiguous()
        if self.level == "int8":
            return torch._weight_int8pack_mm(flat, self.codes, self.scales.to(flat.dtype))
        return blocks_product(flat, self.codes, self.scales)

    def _by_widening(self, flat: torch.Tensor) -> torch.Tensor:
        out, rows = self.shape[0], piece_rows(self.shape)
        in_float32 = uses_float32(flat.device, flat.dtype)
        product = self._float32_product if in_float32 else self._piece_product
        with buffer_in_use():
            if rows >= out:
                return product(flat, 0, out)
            output = flat.new_empty(len(flat), out)
            for first in range(0, out, rows):
                last = min(first + rows, out)
                output[:, first:last] = product(flat, first, last)
            return output

    def _piece_product(self, flat: torch.Tensor, first: int, last: int) -> torch.Tensor:
        values = (last - first) * self.shape[1]
        buffer = widening_buffer(values, flat.dtype, flat.device)
        weights, scale = self._widened_piece(buffer, first, last)
        output = functional.linear(flat, weights)
        return output if scale is None else output.mul_(scale)

    def _float32_product(self, flat: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """As `_piece_product`, computed in float32 and rounded, where bfloat16 is emulated.

        States and products are in the buffer too: taking new memory each time costs a fifth
        more.
        """
        inputs, rows, count = self.shape[1], last - first, min(len(flat), TOKENS_AT_ONCE)
        sizes = [rows * inputs, count * inputs, count * rows]
        buffer = widening_buffer(sum(sizes), torch.float32, flat.device)
        wide, states, products = torch.split(buffer, sizes)
        weights, scale = self._widened_piece(wide, first, last)
        output = flat.new_empty(len(flat), rows)
        for some, rounded in zip(torch.split(flat, count), torch.split(output, count), strict=True):
            product = products.view(count, rows)[: len(some)]
            torch.mm(states.view(count, inputs)[: len(some)].copy_(some), weights.T, out=product)
            rounded.copy_(product if scale is None else product.mul_(scale))
        return output

    def _widened_piece(
        self, buffer: torch.Tensor, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Some rows widened into a buffer, and the scale of each row if that is left out."""
        inputs, rows = self.shape[1], last - first
        if self.level == "int8":
            return buffer.view(rows, inputs).copy_(self.codes[first:last]), self.scales[first:last]
        shape = (inputs, rows) if self.in_blocks else (rows, inputs)
        weights = buffer.view(shape).T if self.in_blocks else buffer.view(shape)
        self.widen(weights, first)
        return weights, None

    def code_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The half bytes of single rows, (n,) to (n, bytes); at int4 the codes, (n, in)."""
        if self.in_blocks:
            block, row = rows // BLOCK, rows % BLOCK
            codes = self.codes[block, :, row % HALF]
            return torch.where((row < HALF)[:, None], codes & 15, codes >> 4)
        return unpaired(self.codes[rows], self.shape[1])


@lru_cache(maxsize=16)
def kernel_rows(level: PackedLevel, dtype: torch.dtype) -> int:
    """Most rows of a product for which torch's packed kernel of CPUs is faster than widening.

    Only with bfloat16 states it is faster at all; the range of float16 is too short for some
    scales.
    """
    if dtype != torch.bfloat16:
        return 0
    if kernel_block_rows() == HALF:
        return _KERNEL_ROWS_AVX2[level]
    emulated = uses_float32(torch.device("cpu"), dtype)
    return (_KERNEL_ROWS_EMULATED if emulated else _KERNEL_ROWS)[level]


def choose_packed_dtype(name: str, device: torch.device) -> torch.dtype:
    """As `choose_dtype`, for a model with packed weights.

    Torch's packed kernels of CPUs are fast with bfloat16 states, so ``"auto"`` is bfloat16
    where the int4 kernel reads our layout, even if the CPU emulates unquantised products in
    bfloat16: a decode step of the default model took a fifth of its time with float32 states.
    Without that kernel emulation would double the time of a step.
    """
    if name == "auto" and device.type == "cpu" and kernel_block_rows():
        return torch.bfloat16
    return choose_dtype(name, device)


@lru_cache(maxsize=1)
def kernel_block_rows() -> int:
    """Rows of the blocks that torch's int4 product on this CPU reads: 64, 32, or 0 for others."""
    codes = torch.arange(BLOCK * GROUP_INPUTS, dtype=torch.int32).mul_(7).remainder_(11)
    codes = codes.view(BLOCK, GROUP_INPUTS)
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError):  # no such product in this build of torch
        return 0
    layout = theirs.view(torch.uint8).flatten()
    fitting = (n for n in (BLOCK, HALF) if torch.equal(layout, in_blocks_of(codes, n).flatten()))
    return next(fitting, 0)


def blocks_product(flat: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product of contiguous states with int4 codes in blocks, (rows, in) to (rows, out).

    Args:
        flat: (rows, in).
        codes: (out / 64, in, 32).
        scales: Scales and zeros, (in / 32, out, 2).
    """
    out, scales = scales.shape[1], scales.to(flat.dtype)
    if kernel_block_rows() == BLOCK:
        return torch._weight_int4pack_mm_for_cpu(flat, codes.view(out, -1), GROUP_INPUTS, scales)
    # A kernel that reads blocks of 32 rows takes one of our blocks as 32 rows with twice the
    # inputs: what it reads as inputs ``2 i`` and ``2 i + 1`` are the codes that rows ``r``
    # and ``16 + r`` of either half have for input i. So it computes either set of rows if the
    # states fill one of the two places, and zeros the other one.
    rows, inputs = flat.shape
    sets = (out // BLOCK, 2, 2, HALF // 2)  # blocks, halves, sets of rows, rows
    codes, by_set = codes.view(out // 2, -1), scales.view(-1, *sets, 2)
    output = flat.new_empty(rows, *sets)
    for index in range(2):
        places = flat.new_zeros(rows, inputs, 2)
        places[:, :, index] = flat
        own = by_set[:, :, :, index].reshape(-1, out // 2, 2)
        part = torch._weight_int4pack_mm_for_cpu(places.flatten(1), codes, 2 * GROUP_INPUTS, own)
        output[:, :, :, index] = part.view(output[:, :, :, index].shape)
    return output.view(rows, out)

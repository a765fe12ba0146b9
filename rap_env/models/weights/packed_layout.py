"""The layout of packed codes, and the memory that weights are widened into.

A matrix (out, in) of int4 codes is in blocks of 64 rows, or in pairs of inputs; see
`models.weights.packing`.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Literal

import torch
from torch.nn import functional

PackedLevel = Literal["int8", "int4"]
PACKED_LEVELS: tuple[PackedLevel, ...] = ("int8", "int4")
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

_buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
_buffer_lock = threading.RLock()


def widening_buffer(values: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The process's buffer for widened weights, (values,); hold `buffer_in_use` while using it."""
    key = (device, dtype)
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


def tensor_shapes(level: PackedLevel, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a matrix with one scale a row (int8) or 32 inputs (int4)."""
    out, inputs = shape
    if level == "int8":
        return {"codes": (out, inputs), "scales": (out,)}
    groups = -(-inputs // GROUP_INPUTS)
    blocks = (out // BLOCK, inputs, HALF) if fills_blocks(shape) else (out, -(-inputs // 2))
    return {"codes": blocks, "scales": (groups, out, 2)}


def packed_bytes(level: PackedLevel, shape: tuple[int, int]) -> int:
    """Bytes of a matrix at a level, without making it."""
    sizes = {name: math.prod(part) for name, part in tensor_shapes(level, shape).items()}
    return sizes["codes"] + sizes["scales"] * SCALE_DTYPE.itemsize


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
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor
) -> None:
    """Codes (blocks, in, 32), scale and zero (groups, rows), into (in, rows).

    The codes become signed bytes of 16 times their distance from the middle, which take one
    operation for each half of a byte and convert to any dtype exactly.
    """
    blocks, inputs, _ = codes.shape
    halves = out.view(inputs, blocks, 2, HALF)
    with buffer_in_use():
        signed = widening_buffer(codes.numel(), torch.uint8, codes.device).view(codes.shape)
        torch.bitwise_and(codes, 0xF0, out=signed).bitwise_xor_(0x80)
        halves[:, :, 1].copy_(signed.view(torch.int8).transpose(0, 1))
        torch.bitwise_left_shift(codes, 4, out=signed).bitwise_xor_(0x80)
        halves[:, :, 0].copy_(signed.view(torch.int8).transpose(0, 1))
    groups = out.view(-1, GROUP_INPUTS, len(out[0]))
    # Contiguous: with other strides torch computes one value at a time.
    scale, zero = (part[:, None].to(out.dtype).contiguous() for part in (scale / 16, zero))
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

"""Tensors of a GGUF file at a level.

============  ==============================================================================
Level         Type in the file
============  ==============================================================================
native        its own
int8          Q8_0; the groups of a row have the row's scale
int4          Q4_1, in groups of 32
int4-compact  Q4_1 with the live level's values, which takes half a bit more
int3          the same, 1.6 bits more
int2          Q4_1, rounded again because its groups of 32 are longer, 2.2 bits more
============  ==============================================================================

A tensor that is stored in as few bits already is kept, as live levels do. The codes are those of
the live level; its scales and minima are rounded to float16, which loses less than their bfloat16.
llama.cpp's own types of 3 and 2 bits need rows of a multiple of 256 values.
The layouts of the blocks are those of llama.cpp's ``ggml-common.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from rap_env.errors import UnsupportedModelError
from rap_env.levels import WeightLevel
from rap_env.models.weights.low_bits import LowBitMatrix
from rap_env.models.weights.packed_layout import (
    GROUP_INPUTS,
    LOW_BIT_FORMATS,
    MIDDLE,
    by_input,
)
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import quantise


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor as a file stores it.

    Attributes:
        data: Values (out, in) or (out,); rows of bytes for BF16 and quantised types.
        kind: Its type.
    """

    data: npt.NDArray[Any]
    kind: Kind

    @classmethod
    def of_matrix(cls, matrix: PackedMatrix) -> GgufTensor:
        """A packed matrix of 4 bits or less in Q4_1."""
        if matrix.level == "int2":
            matrix = quantise(matrix.widened(torch.float32), "int4")
        if matrix.level not in LOW_BIT_FORMATS:
            codes = matrix.code_rows(torch.arange(matrix.shape[0]))
            return cls(_q4_1(codes, *matrix.scales.float().unbind(-1)), Kind.Q4_1)
        assert isinstance(matrix, LowBitMatrix)
        pairs = LOW_BIT_FORMATS[matrix.level].kernel_scales(matrix.scales, matrix.zeros)
        scale, zero = (pairs.float() * matrix.factors.float()[:, None]).unbind(-1)
        centred = matrix.widened(torch.float32) - by_input(zero, matrix.shape[1])
        codes = (centred / by_input(scale, matrix.shape[1])).round() + MIDDLE
        return cls(_q4_1(codes, scale, zero), Kind.Q4_1)

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return self.data.nbytes

    @property
    def bits(self) -> float:
        """Bits that it takes for each value, scales included."""
        return _bits(self.kind)

    def values(self) -> npt.NDArray[np.float32]:
        """What it stands for, in float32."""
        return np.asarray(dequantize(self.data, self.kind), dtype=np.float32)

    def at(self, level: WeightLevel, name: str) -> GgufTensor:
        """The tensor at a level; itself where it takes no more bits, and if it is a vector.

        At a level of `LOW_BIT_FORMATS` it is at int4: a matrix that has that level is `of_matrix`.

        Raises:
            UnsupportedModelError: Its rows cannot be cut into groups of 32; `name` is in the text.
        """
        kind = Kind.Q8_0 if level == "int8" else Kind.Q4_1
        if level == "native" or self.data.ndim == 1 or self.bits <= _bits(kind):
            return self
        weight = torch.from_numpy(np.array(self.values()))
        if weight.shape[1] % GROUP_INPUTS:
            raise UnsupportedModelError(
                f"{name} has rows of {weight.shape[1]} values, which is no multiple of "
                f"{GROUP_INPUTS}, so it has no level {level} in a GGUF file; leave it native."
            )
        if kind == Kind.Q8_0:
            return GgufTensor(_q8_0(quantise(weight, "int8")), kind)
        return GgufTensor.of_matrix(quantise(weight, "int4"))

    @classmethod
    def zeros(cls, *shape: int) -> GgufTensor:
        """Zeros in float32."""
        return cls(np.zeros(shape, np.float32), Kind.F32)

    @classmethod
    def small_zeros(cls, rows: int, inputs: int) -> GgufTensor:
        """A matrix of zeros in as few bytes as its rows allow."""
        if inputs % GROUP_INPUTS:
            return cls.zeros(rows, inputs)
        blocks = gguf.quantize(np.zeros((rows, inputs), np.float32), Kind.Q4_0)
        return cls(blocks, Kind.Q4_0)


def _bits(kind: Kind) -> float:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return float(8 * size / values)


def _q8_0(matrix: PackedMatrix) -> npt.NDArray[np.uint8]:
    """Blocks of a scale and 32 codes, (out, bytes)."""
    rows = matrix.shape[0]
    codes = matrix.codes.numpy().reshape(rows, -1, GROUP_INPUTS)
    scales = matrix.scales.float().numpy().astype(np.float16)
    scales = np.broadcast_to(scales[:, None, None], (*codes.shape[:2], 1))
    parts = [np.ascontiguousarray(part).view(np.uint8) for part in (scales, codes)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _q4_1(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Blocks of a scale, a minimum and 32 codes, two a byte, (out, bytes).

    Args:
        codes: 0 to 15, (out, in).
        scale: (groups, out).
        zero: The weight of code 8, (groups, out).
    """
    rows = len(codes)
    blocks = codes.to(torch.uint8).numpy().reshape(rows, -1, GROUP_INPUTS)
    low, high = np.split(blocks, 2, axis=-1)
    numbers = torch.stack((scale.T, (zero - MIDDLE * scale).T), dim=-1).numpy().astype(np.float16)
    parts = [np.ascontiguousarray(numbers).view(np.uint8), low | (high << 4)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)

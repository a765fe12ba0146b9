"""Tensors of a GGUF file at a level, and from torch tensors.

======  ====================================================================================
Level   Type in the file
======  ====================================================================================
native  its own; of unquantised models F32, F16 or BF16, vectors always F32
int8    Q8_0; the groups of a row have the row's scale
int4    Q4_1, in groups of 32
======  ====================================================================================

A tensor that is stored in as few bits already is kept, as live levels do. The codes are those of
the live level; its scales and minima are rounded to float16, which loses less than their bfloat16.
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
from rap_env.models.weights.packed_layout import GROUP_INPUTS
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import quantise

_PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_MIDDLE = 8  # the int4 code that stands for the zero itself


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
    def of(cls, tensor: torch.Tensor) -> GgufTensor:
        """A tensor of a model in its own dtype; a vector in float32, as llama.cpp requires."""
        tensor = tensor.detach().cpu()
        if tensor.dim() == 1 or tensor.dtype == torch.float32:
            return cls(tensor.float().contiguous().numpy(), Kind.F32)
        if tensor.dtype == torch.bfloat16:
            return cls(tensor.contiguous().view(torch.uint8).numpy(), Kind.BF16)
        return cls(tensor.contiguous().numpy(), _PLAIN[tensor.dtype])

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

        Raises:
            UnsupportedModelError: Its rows cannot be cut into groups of 32; `name` is in the text.
        """
        kind = {"int8": Kind.Q8_0, "int4": Kind.Q4_1}.get(level)
        if kind is None or self.data.ndim == 1 or self.bits <= _bits(kind):
            return self
        weight = torch.from_numpy(np.array(self.values()))
        if weight.shape[1] % GROUP_INPUTS:
            raise UnsupportedModelError(
                f"{name} has rows of {weight.shape[1]} values, which is no multiple of "
                f"{GROUP_INPUTS}, so it has no level {level} in a GGUF file; leave it native."
            )
        packed = quantise(weight, "int8" if kind == Kind.Q8_0 else "int4")
        return GgufTensor(_q8_0(packed) if kind == Kind.Q8_0 else _q4_1(packed), kind)

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


def _q4_1(matrix: PackedMatrix) -> npt.NDArray[np.uint8]:
    """Blocks of a scale, a minimum and 32 codes, two a byte, (out, bytes)."""
    rows = matrix.shape[0]
    codes = matrix.code_rows(torch.arange(rows)).to(torch.uint8).numpy()
    codes = codes.reshape(rows, -1, GROUP_INPUTS)
    low, high = np.split(codes, 2, axis=-1)
    scale, zero = (part.T.float() for part in matrix.scales.unbind(-1))
    numbers = torch.stack((scale, zero - _MIDDLE * scale), dim=-1).numpy().astype(np.float16)
    parts = [np.ascontiguousarray(numbers).view(np.uint8), low | (high << 4)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)

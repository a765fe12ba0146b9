"""Read GGUF files: their headers, and their quantised tensors as packed matrices.

============================  =================================================================
Types in the file             Packed as
============================  =================================================================
Q4_0, Q4_1, Q4_K              int4 with the file's own codes, scale and minimum of each group of
                              32 inputs; only scales and zeros are rounded, to bfloat16
all other quantised types     int8 with one scale per row, rounded to the nearest code
F32, F16, BF16                unquantised
============================  =================================================================

No tensor is widened as a whole. The layouts of the blocks are those of llama.cpp's
``ggml-common.h``.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.weights.packing import MIDDLE, PackedMatrix
from rap_env.models.weights.quantisers import quantise


class GgufFile(GGUFReader):  # type: ignore[misc]  # gguf has no types
    """gguf's reader with errors of this project, and fast for large vocabularies.

    Args:
        path: The file. It stays mapped as long as this object or one of its tensors exists.

    Attributes:
        fields: Entries of the header by name.
        tensors: The tensors, in the order of the file; `data` has the shape that is stored,
            with rows of bytes for quantised types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            super().__init__(path)
        except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
            # The type of the error depends on the place of the damage.
            raise ChecksumError(
                f"{path} is no GGUF file of version 2 or 3, or it is damaged ({error}); download "
                "it again, or convert it with llama.cpp's tools."
            ) from error
        if self.byte_order == "S":
            raise UnsupportedModelError(
                f"{path} is a GGUF file of the other byte order, which cannot be read; convert it "
                "with llama.cpp's tools."
            )
        for name in ("version", "tensor_count", "kv_count"):  # of the file, not of the model
            del self.fields[f"GGUF.{name}"]

    def value(self, name: str, default: Any = None) -> Any:
        """The content of a header entry, or `default` without such an entry."""
        field = self.fields.get(name)
        return default if field is None else field.contents()

    def forget_pages(self) -> None:
        """Let go the pages of the file that were read so far; they would count as used memory."""
        with contextlib.suppress(AttributeError):  # Linux only
            self.data.base.madvise(mmap.MADV_DONTNEED)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """As gguf's, which takes seconds for a vocabulary, and follows any number of entries."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        content = memoryview(self.data)
        kind, count = struct.unpack_from("<IQ", content, orig_offs)
        inner, end = GGUFValueType(kind), orig_offs + 12
        parts: list[npt.NDArray[Any]] = []
        if inner == GGUFValueType.STRING:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", content, end)
                parts.append(np.frombuffer(content, np.uint8, length, end + 8))
                end += 8 + length
        else:
            values = np.frombuffer(content, self.gguf_scalar_to_np[inner], count, end)
            parts, end = list(values.reshape(-1, 1)), end + values.nbytes
        return end - orig_offs, parts, list(range(count)), [GGUFValueType.ARRAY, inner]


@contextlib.contextmanager
def transformers_reads(file: GgufFile) -> Iterator[None]:
    """Let transformers use `file` where it would read the same GGUF file again.

    It also keeps gguf's table of tensor names, which transformers builds anew for each
    submodule. Both are looked up in the package at each call, and put back afterwards; other
    files are read as before.
    """
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    def opened(path: Any, *args: Any, **options: Any) -> Any:
        return file if Path(path) == file.path else reader(path, *args, **options)

    package: Any = gguf
    package.GGUFReader, package.get_tensor_name_map = opened, functools.cache(names)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, names


UNQUANTISED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""Types that are kept as they are, with their dtypes."""

Blocks = npt.NDArray[np.uint8]
_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_PIECE_VALUES = 2**21  # values of an int8 matrix that are dequantised at a time
_GROUP = 32  # inputs with a common scale


def packed_blocks(
    blocks: Blocks, kind: GGMLQuantizationType, order: npt.NDArray[np.int64] | None = None
) -> PackedMatrix:
    """Pack the rows of a quantised tensor.

    Args:
        blocks: (out, bytes of a row), as the file stores them.
        kind: Their type.
        order: The row of the file that becomes each row of the matrix, (out,); None keeps
            them.
    """
    if order is None:
        order = np.arange(len(blocks))
    unpack = _INT4.get(kind)
    if unpack is None:
        return _int8(blocks, kind, order)
    size = GGML_QUANT_SIZES[kind][1]
    codes, scale, minimum = unpack(torch.from_numpy(blocks[order].reshape(len(blocks), -1, size)))
    return PackedMatrix.from_codes(codes, scale, zero=minimum + MIDDLE * scale)


def packs_as_int4(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of a type have 4-bit codes, scales and minima of groups of 32."""
    return kind in _INT4


def widened_rows(
    blocks: Blocks, kind: GGMLQuantizationType, order: npt.NDArray[np.int64]
) -> Iterator[torch.Tensor]:
    """The rows of a quantised tensor in float32 and in an order, some at a time, (rows, in)."""
    elements, size = GGML_QUANT_SIZES[kind]
    rows = max(1, _PIECE_VALUES // (blocks.shape[1] // size * elements))
    for first in range(0, len(blocks), rows):
        yield torch.from_numpy(dequantize(blocks[order[first : first + rows]], kind))


def _int8(blocks: Blocks, kind: GGMLQuantizationType, order: npt.NDArray[np.int64]) -> PackedMatrix:
    codes = torch.empty((0, 0), dtype=torch.int8)
    scales, first = [], 0
    for part in widened_rows(blocks, kind, order):
        packed = quantise(part, "int8")
        if not first:
            codes = codes.resize_(len(blocks), part.shape[1])
        codes[first : first + len(part)] = packed.codes
        scales.append(packed.scales)
        first += len(part)
    return PackedMatrix.from_codes(codes, torch.cat(scales))


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Two 16-bit floats at the start of each block, (..., 2), as float32."""
    return blocks[..., :4].contiguous().view(torch.float16).float()


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    """Codes of groups whose first half is in the low bits, (rows, n, b) to (rows, n * 2 b)."""
    return torch.cat((stored & 15, stored >> 4), dim=-1).flatten(1)


def _q4_0(blocks: torch.Tensor) -> _Parts:
    """A 16-bit scale, then 16 bytes of codes; weight = scale * (code - 8)."""
    scale = blocks[..., :2].contiguous().view(torch.float16).float()[..., 0]
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(blocks: torch.Tensor) -> _Parts:
    """A 16-bit scale and minimum, then 16 bytes of codes; weight = scale * code + minimum."""
    scale, minimum = _halves(blocks).unbind(-1)
    return _nibbles(blocks[..., 4:]), scale, minimum


def _q4_k(blocks: torch.Tensor) -> _Parts:
    """Two 16-bit factors, 8 scales and minima of 6 bits in 12 bytes, then 128 bytes of codes.

    Each 32 bytes of codes hold one group in the low and the next one in the high bits.
    """
    factor, low_factor = torch.chunk(_halves(blocks), 2, dim=-1)
    first, second, high = torch.chunk(blocks[..., 4:16], 3, dim=-1)
    # the last four scales and minima: low bits in `high`, high bits above those of the first
    # four
    scale = torch.cat((first & 63, (high & 15) | ((first >> 6) << 4)), dim=-1)
    minimum = torch.cat((second & 63, (high >> 4) | ((second >> 6) << 4)), dim=-1)
    codes = blocks[..., 16:].reshape(len(blocks), -1, _GROUP)
    return (
        _nibbles(codes),
        (factor * scale).flatten(1),
        (-low_factor * minimum).flatten(1),
    )


_INT4: dict[GGMLQuantizationType, Callable[[torch.Tensor], _Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}

"""Read a GGUF file's header and find its tensors: a fast stand-in for gguf's own reader.

`gguf.GGUFReader` makes several arrays for each entry of a vocabulary, which takes seconds, and
transformers creates one for each of config, tokenizer and weights. `GgufFile` has the part of its
interface that transformers uses, and reads a vocabulary of 262,144 entries in a fraction of a
second.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, ReaderField
from gguf.gguf_reader import ReaderTensor
from gguf.quants import quant_shape_to_byte_shape

from rap_env.errors import ChecksumError, UnsupportedModelError

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # unless the header names another one
_NUMBERS: dict[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
"""How struct and numpy read a number of each type."""


class GgufFile:
    """The header of a GGUF file, and views of its tensors' stored bytes.

    Args:
        path: The file. It stays mapped as long as this object or one of its tensors exists.

    Attributes:
        fields: Entries of the header by name.
        tensors: The tensors, in the order of the file; `data` has the shape that is stored, with
            rows of bytes for quantised types.

    Raises:
        ChecksumError: It is not a GGUF file, or truncated.
        UnsupportedModelError: It has another byte order or version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != _MAGIC:
                raise ChecksumError(
                    f"{path} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}."
                )
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._read()
            except UnsupportedModelError:
                raise
            except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
                # The type of the error depends on the place of the damage.
                raise ChecksumError(
                    f"{path} is truncated or damaged ({error}); download it again."
                ) from error

    def value(self, name: str, default: Any = None) -> Any:
        """The content of a header entry, or `default` without such an entry."""
        field = self.fields.get(name)
        return default if field is None else field.contents()

    def _read(self) -> None:
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self.path} has GGUF version {version:#x}, and little-endian files of version 2 "
                "or 3 can be read; convert it with llama.cpp's tools."
            )
        tensors, entries = self._number("<Q"), self._number("<Q")
        self.fields: dict[str, ReaderField] = {}
        for _ in range(entries):
            name = self._text().decode()
            self.fields[name] = self._field(name)
        found = [self._tensor_entry() for _ in range(tensors)]
        alignment = int(self.value("general.alignment", _ALIGNMENT))
        start = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(start, *entry) for entry in found]

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self) -> bytes:
        begin = self._at + 8
        (length,) = struct.unpack_from("<Q", self._bytes, self._at)
        self._at = begin + length
        if self._at > len(self._bytes):
            raise ValueError(f"a text ends at byte {self._at} of {len(self._bytes)}")
        return self._bytes[begin : self._at]

    def _field(self, name: str) -> ReaderField:
        begin = self._at
        kind = GGUFValueType(self._number("<I"))
        if kind == GGUFValueType.STRING:
            return ReaderField(begin, name, [np.frombuffer(self._text(), np.uint8)], [0], [kind])
        if kind != GGUFValueType.ARRAY:
            return ReaderField(begin, name, [np.array([self._number(_NUMBERS[kind])])], [0], [kind])
        inner, count = GGUFValueType(self._number("<I")), self._number("<Q")
        if inner == GGUFValueType.STRING:
            parts: list[Any] = [np.frombuffer(self._text(), np.uint8) for _ in range(count)]
        else:
            values = np.frombuffer(self._bytes, np.dtype(_NUMBERS[inner]), count, self._at)
            self._at += values.nbytes
            parts = list(values.reshape(-1, 1))
        return ReaderField(begin, name, parts, list(range(count)), [kind, inner])

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._text().decode()
        sizes = tuple(self._number("<Q") for _ in range(self._number("<I")))
        return name, sizes, GGMLQuantizationType(self._number("<I")), self._number("<Q")

    def _tensor(
        self, start: int, name: str, sizes: tuple[int, ...], kind: GGMLQuantizationType, offset: int
    ) -> ReaderTensor:
        shape = tuple(reversed(sizes))  # the file has the fastest index first
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        dtype: npt.DTypeLike = plain.get(kind, np.uint8)
        stored = shape if kind in plain else quant_shape_to_byte_shape(shape, kind)
        count = int(np.prod(stored))
        data = np.frombuffer(self._bytes, dtype, count, start + offset).reshape(stored)
        field = ReaderField(start + offset, name, [], [], [])
        return ReaderTensor(
            name, kind, np.array(sizes, np.uint32), int(np.prod(shape)), data.nbytes,
            start + offset, data, field,
        )  # fmt: skip


@contextlib.contextmanager
def transformers_reads(file: GgufFile) -> Iterator[None]:
    """Let transformers use `file` where it would read the same GGUF file again.

    It also keeps gguf's table of tensor names, which transformers builds anew for each submodule.
    Both are looked up in the package at each call, and put back afterwards; other files are read
    as before.
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

"""Tensors in safetensors files, read one at a time into memory that is there already."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError

_PIECE_VALUES = 2**20  # are converted at a time
_LENGTH_BYTES = 8  # at the head of a safetensors file: the length of its table
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of tensors that can be read, by their names in the files."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Attributes:
        path: The file.
        offset: Where its bytes begin in the file.
        shape: Its shape.
        stored_dtype: Its dtype in the file.
        dtype: The dtype that it is wanted in.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, as it is wanted."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def reading_bytes(self) -> int:
        """Bytes that reading it takes on a CPU beside the result."""
        piece = min(math.prod(self.shape), _PIECE_VALUES)
        return 0 if self.dtype == self.stored_dtype else piece * self.stored_dtype.itemsize

    @torch.inference_mode(False)
    def read(self, device: torch.device) -> torch.Tensor:
        """A copy in memory.

        The file is read, not mapped as safetensors' own reader does it: that maps the whole
        file, and the pages that were touched would count as the process's memory.

        Args:
            device: Where the copy lies.

        Raises:
            ChecksumError: The file is truncated.
            ModelNotAvailableError: It is gone.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype, device=device)
        self.read_into(tensor)
        return tensor

    @torch.inference_mode(False)
    def read_into(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor of this shape and dtype; errors as for `read`."""
        direct = self.stored_dtype == self.dtype and tensor.device.type == "cpu"
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                for piece in torch.split(tensor.view(-1), _PIECE_VALUES):
                    stored = piece if direct else torch.empty(len(piece), dtype=self.stored_dtype)
                    into = stored.view(torch.uint8).numpy().data
                    if file.readinto(into) < len(into):
                        raise ChecksumError(
                            f"The weights in {self.path} are truncated or damaged; get the model "
                            "again."
                        )
                    if not direct:
                        piece.copy_(stored)
        except FileNotFoundError:
            raise ModelNotAvailableError(
                f"{self.path} is gone since the model was opened; put it back and open it again."
            ) from None

    def wanted(self, dtype: torch.dtype) -> StoredTensor:
        """The same tensor, wanted in a dtype."""
        return replace(self, dtype=dtype)


def stored_tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, StoredTensor]:
    """Tensors in the safetensors files of a folder that can be read one by one, by name.

    Each is wanted in the dtype that it is stored in.

    Raises:
        ChecksumError: A file is truncated or damaged.
    """
    found = {}
    for path in sorted(folder.glob(pattern)):
        for name, entry in read_table(path).items():
            if (dtype := DTYPES.get(entry["dtype"])) is not None:
                found[name] = StoredTensor(path, entry["at"], tuple(entry["shape"]), dtype, dtype)
    return found


def read_table(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors; offsets as in the file.

    Raises:
        ChecksumError: It is truncated or damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        try:
            table: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError as error:
            raise damaged(path.parent, error) from error
    table.pop("__metadata__", None)
    begin = _LENGTH_BYTES + length
    return {
        name: {**entry, "at": begin + entry["data_offsets"][0]} for name, entry in table.items()
    }


def damaged(folder: Path, error: Exception) -> ChecksumError:
    """The error for weights that cannot be read."""
    return ChecksumError(
        f"The weights in {folder} are truncated or damaged ({error}); get the model again."
    )

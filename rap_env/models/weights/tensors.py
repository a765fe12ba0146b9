"""The weights of a model: names, bytes, fingerprint, and tensors in safetensors files."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rap_env.artifacts import atomic_write, canonical_json
from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.models.device import own_pages
from rap_env.models.weights.packed_modules import PackedModule

# Entries of a config that do not affect what the model computes, or (dtype) that the tensors
# themselves state.
_VOLATILE_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}

_PIECE_VALUES = 2**20  # values that are converted at a time
_LENGTH_BYTES = 8  # at the start of a safetensors file: the length of its header
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}  # that can be read, by their names in safetensors files
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = [_DTYPES[name] for name in ("U8", "I8", "F16", "BF16", "F32", "F64")]
"""Dtypes from the last to the first ones in a file, so that all are aligned."""


def named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers with their names; a tied tensor under each of its names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def tensor_key(tensor: torch.Tensor) -> tuple[int, torch.dtype, int]:
    """A key that is equal for two names of one tensor; its last entry is the tensor's bytes."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.numel() * tensor.element_size()


def distinct_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """As `named_weights`, each tensor once under the first of its names, in their order."""
    seen = set()
    for name, tensor in sorted(named_weights(model), key=lambda item: item[0]):
        if (key := tensor_key(tensor)) not in seen:
            seen.add(key)
            yield name, tensor


def fingerprint_of(config: Any, weights: Iterable[tuple[str, torch.Tensor | StoredTensor]]) -> str:
    """SHA-256 over a model's config and every weight (name, dtype, shape, bytes), in hex.

    Args:
        config: The config.
        weights: The model's `distinct_weights` with no block removed, in memory or in files.
    """
    entries = json.loads(config.to_json_string())
    kept = {k: v for k, v in entries.items() if k not in _VOLATILE_CONFIG and k[:1] != "_"}
    total = hashlib.sha256(canonical_json(kept).encode())
    for name, tensor in weights:
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        pieces = (
            [tensor.detach().cpu()] if isinstance(tensor, torch.Tensor) else pieces_of([tensor])
        )
        for piece in pieces:
            total.update(bytes_of(piece).numpy().data)
    return total.hexdigest()


def untied_weights(
    model: nn.Module, blocks: Iterable[Iterable[nn.Module]]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Weights that only one block uses, (2L,), and all others, by their names in the model.

    Weights are parameters, and the tensors of packed modules. One with several names is among
    the others. Different ones that share memory are in neither: moving one would separate
    them. No block may be removed from the model; `blocks` has the modules of each, in order
    of index.
    """
    named = dict(weights_of(model))  # one name for each object
    users = Counter(tensor_key(parameter) for parameter in named.values())
    alone = {n: p for n, p in named.items() if users[tensor_key(p)] == 1}
    seen = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    names = {id(parameter): name for name, parameter in alone.items()}
    own = []
    for modules in blocks:
        inside = [p for part in modules for _, p in weights_of(part) if id(p) in names]
        own.append({names[id(p)]: p for p in inside if seen[tensor_key(p)] == 1})
    in_blocks = {name for block in own for name in block}
    return own, {name: p for name, p in alone.items() if name not in in_blocks}


def weights_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the tensors of packed modules, each object once."""
    yield from module.named_parameters()
    seen = set()
    for path, part in module.named_modules():
        for name, tensor in part.tensors().items() if isinstance(part, PackedModule) else ():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}".lstrip("."), tensor


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Attributes:
        offset: Where its bytes begin in the file.
        stored_dtype: Its dtype in the file.
        dtype: The dtype to read it in.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @torch.inference_mode(False)
    def read(self, device: torch.device) -> torch.Tensor:
        """A copy in memory.

        The file is read, not mapped. Safetensors' own reader maps the whole file, and every
        page that was read would count as memory of the process.
        """
        if device.type == "cpu" and self.nbytes:
            # Not itself a view of its pages: they are freed when it gets other data.
            tensor = torch.empty(0, dtype=self.dtype)
            tensor.data = own_pages(self.nbytes, huge=True).view(self.dtype).view(self.shape)
        else:
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
                            f"The weights in {self.path} are truncated or damaged; download the "
                            "model again."
                        )
                    if not direct:
                        piece.copy_(stored)
        except ChecksumError:
            raise
        except OSError as error:
            raise not_readable(error) from error

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some rows, in memory."""
        first, last, _ = rows.indices(self.shape[0])
        row_values = math.prod(self.shape[1:])
        offset = self.offset + first * row_values * self.stored_dtype.itemsize
        part = replace(self, offset=offset, shape=(last - first, *self.shape[1:]))
        return part.read(torch.device("cpu"))

    def as_dtype(self, dtype: torch.dtype) -> StoredTensor:
        """The same tensor, to be read in another dtype."""
        return replace(self, dtype=dtype)


def pieces_of(tensors: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """The values of stored tensors, of which a few MiB are in memory at a time."""
    for stored in tensors:
        flat = replace(stored, shape=(math.prod(stored.shape),))
        for first in range(0, flat.shape[0], _PIECE_VALUES):
            yield flat[first : first + _PIECE_VALUES]


def stored_tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, StoredTensor]:
    """Tensors in the safetensors files of a folder that can be read one by one, by name.

    Each has the dtype that it is stored in.
    """
    tensors = {}
    for path in sorted(folder.glob(pattern)):
        table, begin = _header(path)
        for name, entry in table.items():
            if (dtype := _DTYPES.get(entry.get("dtype"))) is not None:
                at = begin + entry["data_offsets"][0]
                tensors[name] = StoredTensor(path, at, tuple(entry["shape"]), dtype, dtype)
    return tensors


def check_lengths(tensors: Iterable[StoredTensor]) -> None:
    """Raise a `ChecksumError` if a file ends before the last of its tensors."""
    for tensor in tensors:
        end = tensor.offset + math.prod(tensor.shape) * tensor.stored_dtype.itemsize
        if tensor.path.stat().st_size < end:
            raise damaged_weights(tensor.path.parent, f"{tensor.path.name} is too short")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        try:
            table: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError as error:
            raise damaged_weights(path.parent, error) from error
    return table, _LENGTH_BYTES + length


def not_readable(error: OSError) -> ModelNotAvailableError:
    """The error for a file of weights that cannot be opened or read any more."""
    return ModelNotAvailableError(
        f"{error.filename} cannot be read any more ({error.strerror}); put the model's own file "
        "back, or open the model again."
    )


def damaged_weights(folder: Path, error: Exception | str) -> ChecksumError:
    """The error for weights that cannot be read."""
    return ChecksumError(
        f"The weights in {folder} are truncated or damaged ({error}); download the model again."
    )


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the layout of safetensors' own `save_file`.

    Use it as a context manager.

    Args:
        path: The file, which is incomplete until every tensor is written.
        forms: The tensors by name, whose dtypes and shapes count; they may be on the meta
            device.
        facts: Texts by name, for the file's metadata.
    """

    def __init__(self, path: Path, forms: Mapping[str, torch.Tensor], **facts: str) -> None:
        order = sorted(forms, key=lambda name: (-_ORDER.index(forms[name].dtype), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **facts}}
        end = 0
        for name in order:
            begin, end = end, end + forms[name].nbytes
            header[name] = {
                "dtype": _NAMES[forms[name].dtype],
                "shape": [*forms[name].shape],
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self._begin = _LENGTH_BYTES + len(text)
        self._forms, self._offsets = forms, {n: header[n]["data_offsets"][0] for n in order}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write a tensor, as parts of its first dimension one after the other."""
        form = self._forms[name]
        self._file.seek(self._begin + self._offsets[name])
        written = 0
        for part in parts:
            assert part.dtype == form.dtype
            written += self._file.write(bytes_of(part).numpy().data)
        assert written == form.nbytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file with a checksum of its tensors."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(whole.items())
    # safetensors' own `save` takes twice the memory of the tensors.
    with atomic_write(path) as file, TensorWriter(Path(file.name), whole, sha256=checksum) as out:
        for name, tensor in whole.items():
            out.write(name, [tensor])


def verified_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file that `write_tensors` wrote, on the CPU."""
    stored = stored_tensors(path.parent, path.name)
    tensors = {name: tensor.read(torch.device("cpu")) for name, tensor in stored.items()}
    metadata = _header(path)[0].get("__metadata__", {})
    if metadata.get("sha256") != _checksum(tensors.items()):
        raise ChecksumError(
            f"The content of {path} does not match its checksum; delete the file, and run the "
            "command that made it (such as `rap prepare`) again."
        )
    return tensors


def _checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(bytes_of(tensor).numpy().data)
    return total.hexdigest()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().view(-1).view(torch.uint8)

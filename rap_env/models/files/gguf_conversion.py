"""Convert GGUF files to model folders: packed ones, or ones that transformers loads.

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
import copy
import functools
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import nn

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.families.families import adapter_for, check_family
from rap_env.models.files.weight_files import PACKED_FILE, model_without_weights, require_all
from rap_env.models.weights.low_bits import tensor_shapes
from rap_env.models.weights.packed_modules import is_packable, matrices_of
from rap_env.models.weights.packing import MIDDLE, SCALE_DTYPE, PackedLevel, PackedMatrix
from rap_env.models.weights.quantisers import quantise
from rap_env.models.weights.tensors import TensorWriter


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


def convert(path: Path, packed: bool, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder; see `converted_gguf`."""
    file = GgufFile(path)
    with transformers_reads(file):
        config = _read_config(file)
        if packed:
            _keep_finer_vocabulary(file, config)
        _tokenizer(file, config).save_pretrained(folder)
        _write_model(file, config, packed, folder)


_VOCABULARY = ("token_embd.weight", "output.weight")


def _keep_finer_vocabulary(file: GgufFile, config: Any) -> None:
    """Tie the head to the embeddings if both are one matrix, and keep the copy with more bits."""
    copies = [tensor for tensor in file.tensors if tensor.name in _VOCABULARY]
    if len(copies) == len(_VOCABULARY) and _agree(*copies):
        finer = max(copies, key=lambda tensor: int(tensor.n_bytes))
        others = [tensor for tensor in file.tensors if tensor.name not in _VOCABULARY]
        file.tensors = [finer._replace(name=_VOCABULARY[0]), *others]
        config.tie_word_embeddings = True
    file.forget_pages()


def _agree(*copies: ReaderTensor) -> bool:
    """Whether two tensors differ, in each row, by no more than the coarser one is rounded.

    In groups of 32 normally distributed weights a step of b bits is about 4.2 / 2**b of their
    standard deviation, and the error 0.29 of a step. With up to a bit of each weight for scales
    that is 2.4 / 2**bits; twice as much is allowed.
    """
    one, other = copies
    if not np.array_equal(one.shape, other.shape):
        return False
    limit = 5 / 2 ** min(8 * int(tensor.n_bytes) / int(tensor.n_elements) for tensor in copies)
    order = np.arange(len(one.data))
    parts = [widened_rows(t.data.view(np.uint8), t.tensor_type, order) for t in copies]
    return all(
        bool(((some - same).norm(dim=1) <= limit * same.norm(dim=1)).all())
        for some, same in zip(*parts, strict=True)
    )


def _tokenizer(file: GgufFile, config: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True
        )
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{file.path} has no tokenizer that transformers can read ({error}); use a file with "
            "one, or the model's safetensors version."
        ) from error
    _correct_tokenizer(tokenizer, file.value("tokenizer.ggml.pre"), config)
    return tokenizer


def _read_config(file: GgufFile) -> Any:
    """The config of the model in a file."""
    from transformers import AutoConfig

    path, architecture = file.path, file.value("general.architecture")
    if architecture is None:
        raise ChecksumError(
            f"{path} names no architecture, so it is not a language model; use another file."
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError) as error:
        check_family(architecture)
        raise UnsupportedModelError(
            f"transformers cannot read {architecture!r} models from GGUF files ({error}); "
            "use the model's safetensors version."
        ) from error
    adapter_for(config)
    return config


def _correct_tokenizer(tokenizer: Any, pre: str | None, config: Any) -> None:
    """Set what transformers omits when it reads a tokenizer from a GGUF file."""
    from tokenizers import pre_tokenizers

    limit = getattr(config, "max_position_embeddings", None)
    if limit:
        tokenizer.model_max_length = limit
    if pre == "smollm":
        # Digits are single tokens in this vocabulary; else "  1" would be split differently.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _write_model(file: GgufFile, config: Any, packed: bool, folder: Path) -> None:
    """Write config and weights, of which one tensor at a time is in memory."""
    from transformers import GenerationConfig

    skeleton = model_without_weights(config, torch.float32)
    names, process = _name_map(file, skeleton)
    kinds = _kinds(file, names)
    forms: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in skeleton.named_parameters():
        if name in kinds:
            forms[name] = _forms(skeleton, name, parameter, kinds[name] if packed else _WIDE)
    stored = {key: form for parts in forms.values() for key, form in parts.items()}
    require_all(skeleton, stored, file.path)
    with TensorWriter(folder / (PACKED_FILE if packed else "model.safetensors"), stored) as out:
        for name, content in _contents(file, skeleton, names, process, kinds if packed else {}):
            for key, (shape, parts) in content.items() if name in forms else ():
                if shape != stored[key].shape:
                    raise UnsupportedModelError(
                        f"{file.path} does not fit its own config: {name!r} has shape "
                        f"{tuple(shape)}, and {tuple(stored[key].shape)} was expected."
                    )
                out.write(key, parts)
            file.forget_pages()
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


_WIDE = GGMLQuantizationType.F32


def _kinds(file: GgufFile, names: Mapping[str, str]) -> dict[str, GGMLQuantizationType]:
    """The type that decides how each parameter is stored; experts come from several tensors."""
    kinds: dict[str, GGMLQuantizationType] = {}
    for tensor in file.tensors:
        name = _target(tensor, names)
        if name and (name not in kinds or not packs_as_int4(tensor.tensor_type)):
            kinds[name] = tensor.tensor_type
    return kinds


def _target(tensor: ReaderTensor, names: Mapping[str, str]) -> str:
    return names.get(tensor.name, names.get(tensor.name.removesuffix(".weight"), ""))


def _forms(
    model: Any, name: str, parameter: torch.Tensor, kind: GGMLQuantizationType
) -> dict[str, torch.Tensor]:
    """What the file has of a parameter, on the meta device."""
    if kind in UNQUANTISED or _child(model, name) is None:
        return {name: parameter.to(UNQUANTISED.get(kind, torch.float32))}
    out, inputs = _oriented(name, parameter, model).shape
    level: PackedLevel = "int4" if packs_as_int4(kind) else "int8"
    dtypes = {"codes": torch.uint8 if level == "int4" else torch.int8, "scales": SCALE_DTYPE}
    return {
        f"{name}_{part}": torch.empty(shape, dtype=dtypes[part], device="meta")
        for part, shape in tensor_shapes(level, (out, inputs)).items()
    }


_Content = dict[str, tuple[torch.Size, Iterable[torch.Tensor]]]
"""Tensors in the file by name: the shape of each, and its parts, rows after rows."""


def _contents(
    file: GgufFile,
    model: Any,
    names: Mapping[str, str],
    process: _Process,
    kinds: Mapping[str, GGMLQuantizationType],
) -> Iterator[tuple[str, _Content]]:
    """The parameters one after the other; those without an entry in `kinds` in float32."""
    remaining = Counter(names.values())  # tensors of the file that become each parameter
    gathered: dict[str, torch.Tensor] = {}  # experts, put together from several tensors
    for tensor in file.tensors:
        kind, target = tensor.tensor_type, _target(tensor, names)
        child = _child(model, target) if target else None
        rows = target in kinds or isinstance(child, nn.Linear | nn.Embedding)
        if child is not None and rows and kind not in UNQUANTISED and len(tensor.shape) == 2:
            row_order = _row_order(tensor, target, model, names, process)
            if row_order is not None:
                if target in kinds:
                    yield target, _packed(target, packed_blocks(tensor.data, kind, row_order))
                else:
                    shape = torch.Size(map(int, reversed(tensor.shape)))
                    yield target, {target: (shape, widened_rows(tensor.data, kind, row_order))}
                continue
        result = process(tensor, dequantize(tensor.data, kind), gathered)
        if result.name is not None:
            if (name := names.get(result.name)) is not None:
                weights = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
                yield name, _as_stored(model, name, weights, kinds.get(name, _WIDE))
            continue
        remaining[target] -= 1
        if target in gathered and not remaining[target]:
            weights = gathered.pop(target)
            yield target, _as_stored(model, target, weights, kinds.get(target, _WIDE))
    for name, weights in gathered.items():
        yield name, _as_stored(model, name, weights, kinds.get(name, _WIDE))


def _packed(name: str, matrix: PackedMatrix) -> _Content:
    return {f"{name}_{part}": (t.shape, [t]) for part, t in matrix.tensors.items()}


_Process = Callable[[ReaderTensor, npt.NDArray[Any], dict[str, torch.Tensor]], Any]


def _name_map(file: GgufFile, model: Any) -> tuple[dict[str, str], _Process]:
    """Names in the model by names in the file, and transformers' treatment of a tensor.

    The latter takes a tensor, values in its place, and what it has gathered so far.
    """
    from transformers import modeling_gguf_pytorch_utils

    theirs: Any = modeling_gguf_pytorch_utils
    config = theirs.load_gguf_checkpoint(str(file.path))["config"]
    architecture = file.value("general.architecture")
    processor: Any = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(
        config=config
    )
    names: dict[str, str] = theirs.get_gguf_hf_weights_map(model, processor)

    def process(
        tensor: ReaderTensor, values: npt.NDArray[Any], gathered: dict[str, torch.Tensor]
    ) -> Any:
        return processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"config": config, "tensors": gathered},
        )

    return names, process


def _row_order(
    tensor: ReaderTensor,
    target: str,
    model: Any,
    names: Mapping[str, str],
    process: _Process,
) -> npt.NDArray[np.int64] | None:
    """The row of a tensor that becomes each row of the packed matrix; None if more changes.

    Transformers' treatment is applied to the numbers of the rows, and to those of the
    columns.
    """
    inputs, rows = (int(size) for size in tensor.shape)
    row_numbers = np.arange(rows, dtype=np.int32)[:, None]
    columns = np.arange(inputs, dtype=np.int32)[None]
    oriented: list[torch.Tensor] = []
    for numbers in (row_numbers, columns):
        values = np.broadcast_to(numbers, (rows, inputs))
        result = process(tensor, values, {})
        if result.name is None or names.get(result.name) != target:
            return None
        if result.weights is values:
            return row_numbers[:, 0].astype(np.int64)
        weights = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
        oriented.append(_oriented(target, weights, model))
    by_row, by_column = oriented
    order = by_row[:, 0]
    rows_move = by_row.shape == (rows, inputs) and bool((by_row == order[:, None]).all())
    moved_rows_only = rows_move and bool((by_column == torch.from_numpy(columns)).all())
    return order.numpy().astype(np.int64) if moved_rows_only else None


def _as_stored(
    model: Any, name: str, weights: torch.Tensor, kind: GGMLQuantizationType
) -> _Content:
    """Weights that were dequantised: packed again, or as they are if they were not quantised."""
    if kind in UNQUANTISED or _child(model, name) is None:
        weights = weights.to(UNQUANTISED.get(kind, torch.float32))
        return {name: (weights.shape, [weights])}
    level: PackedLevel = "int4" if packs_as_int4(kind) else "int8"
    return _packed(name, quantise(_oriented(name, weights, model), level))


def _child(model: Any, name: str) -> nn.Module | None:
    owner, _, attribute = name.rpartition(".")
    child: nn.Module = model.get_submodule(owner)
    if child is not model.get_input_embeddings() and not is_packable(child):
        return None
    return child if attribute in matrices_of(child) else None


def _oriented(name: str, weights: torch.Tensor, model: Any) -> torch.Tensor:
    """A parameter as the matrix (out, in) that a packed module stores."""
    owner, _, attribute = name.rpartition(".")
    child = model.get_submodule(owner)
    shell = copy.copy(child)
    shell._parameters = {**child._parameters, attribute: nn.Parameter(weights, False)}
    return matrices_of(shell)[attribute]

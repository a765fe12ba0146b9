"""Folders with packed weights: written once from a GGUF file, and loaded without widening.

Beside config and tokenizer such a folder has one safetensors file. A packed matrix has codes and
scales there (``model.layers.0.mlp.up_proj.weight_codes`` and ``..._scales``, see
`rap_env.llm.packing`); the type of the codes tells its level. Norms, biases and what cannot be
packed have their usual names and are stored as the GGUF file has them. A tied head is not stored.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import nn

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.llm.adapter import read_config
from rap_env.llm.gguf_blocks import UNQUANTISED, packed_blocks, packs_as_int4
from rap_env.llm.gguf_reader import GgufFile
from rap_env.llm.packed_modules import from_matrices, from_tensors, is_packable, matrices_of
from rap_env.llm.packing import PackedLevel, PackedMatrix
from rap_env.llm.quantisers import quantise
from rap_env.llm.weights import DTYPES, StoredTensor, read_header

PACKED_FILE = "packed.safetensors"
"""The file that makes a model folder a packed one."""

_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
_LEVELS: dict[torch.dtype, PackedLevel] = {torch.int8: "int8", torch.uint8: "int4"}
_CODES = "_codes"


def is_packed(folder: Path) -> bool:
    """Whether a model folder has packed weights, for `load_native`."""
    return (folder / PACKED_FILE).is_file()


def write_packed(file: GgufFile, config: Any, folder: Path) -> str:
    """Write the weights of a GGUF file to a folder, packed as `rap_env.llm.gguf_blocks` says.

    One tensor at a time is unpacked at most.

    Args:
        file: The file.
        config: The config of its model.
        folder: An existing folder; the config is not written.

    Returns:
        The name of the model's class.

    Raises:
        UnsupportedModelError: The file lacks tensors that the config requires, or they have other
            shapes.
    """
    from safetensors.torch import save_file

    skeleton = _skeleton(config, torch.float32)
    stored: dict[str, torch.Tensor] = {}
    for name, content in _contents(file, skeleton):
        wanted: torch.Tensor = skeleton.get_parameter(name)
        if isinstance(content, PackedMatrix):
            wanted = _oriented(name, wanted, skeleton)
        if tuple(content.shape) != tuple(wanted.shape):
            raise UnsupportedModelError(
                f"{file.path} does not fit its own config: {name!r} has shape "
                f"{tuple(content.shape)}, and {tuple(wanted.shape)} was expected."
            )
        if isinstance(content, PackedMatrix):
            stored |= {f"{name}_{part}": tensor for part, tensor in content.tensors.items()}
        else:
            stored[name] = content
    _require_all(skeleton, stored, file.path)
    save_file(stored, folder / PACKED_FILE, {"format": "pt"})
    return type(skeleton).__name__


def load_native(folder: Path, dtype: torch.dtype, model: Any = None) -> Any:
    """The model of a packed folder on the CPU, with packed modules in place.

    Args:
        folder: A folder for which `is_packed` holds.
        dtype: Dtype of activations and of all weights that are not packed.
        model: The model without its weights; transformers' own by default.

    Raises:
        ModelNotAvailableError: A file is missing.
        UnsupportedModelError: The family is not known, or tensors are missing.
        ChecksumError: A file is damaged.
    """
    from transformers import GenerationConfig

    if model is None:
        model = _skeleton(read_config(folder), dtype)
    path = folder / PACKED_FILE
    if not path.is_file():
        raise ModelNotAvailableError(f"{folder} has no {PACKED_FILE}, so it has no packed weights.")
    table = read_header(path)
    _require_all(model, table, path)

    def read(name: str, kind: torch.dtype | None = None) -> torch.Tensor:
        entry = table[name]
        found = _DTYPES[entry["dtype"]]
        place = StoredTensor(path, entry["at"], tuple(entry["shape"]), found, kind or found)
        return place.read(torch.device("cpu"))

    packed = [name.removesuffix(_CODES) for name in table if name.endswith(_CODES)]
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in packed):
        parts = [name for name in packed if name.rpartition(".")[0] == owner]
        names = [f"{name}_{part}" for name in parts for part in ("codes", "scales")]
        tensors = {name.removeprefix(f"{owner}."): read(name) for name in names}
        _replace(model, owner, tensors)
    for name in table:
        if name.rpartition("_")[0] not in packed:
            _set_parameter(model, name, read(name, dtype))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _replace(model: Any, owner: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put a packed module in the place of the module `owner`, and of a head tied to it."""
    child, head = model.get_submodule(owner), model.get_output_embeddings()
    codes = next(tensor for name, tensor in tensors.items() if name.endswith(_CODES))
    packed = from_tensors(child, _LEVELS[codes.dtype], tensors)
    if child is not head and getattr(head, "weight", None) is getattr(child, "weight", ()):
        model.set_output_embeddings(from_matrices(head, packed.matrices))
    model.set_submodule(owner, packed)


def _set_parameter(model: Any, name: str, value: torch.Tensor) -> None:
    """Set a parameter, under each name of a tied one."""
    old, new = model.get_parameter(name), nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def _require_all(model: Any, stored: Any, path: Path) -> None:
    """Raise an `UnsupportedModelError` unless each parameter is stored under one of its names."""
    packed = {name.removesuffix(_CODES) for name in stored if name.endswith(_CODES)}
    found = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in packed}
    found |= {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in stored}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in found]
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {len(missing)} tensors that its config requires, such as {missing[0]!r}."
        )


def _contents(file: GgufFile, model: Any) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    """Parameters by name, each packed or as it is."""
    names, process = _name_map(file, model)
    remaining = Counter(names.values())  # tensors of the file that become each parameter
    gathered: dict[str, torch.Tensor] = {}  # experts, put together from several tensors
    kinds: dict[str, GGMLQuantizationType] = {}
    for tensor in file.tensors:
        kind = tensor.tensor_type
        target = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight"), ""))
        child = _child(model, target) if target else None
        if child is not None and kind not in UNQUANTISED and len(tensor.shape) == 2:
            found = _row_order(tensor, target, model, names, process)
            if found is not None:
                order = None if np.array_equal(found, np.arange(len(found))) else found
                yield target, packed_blocks(tensor.data, kind, order)
                continue
        result = process(tensor, dequantize(tensor.data, kind), gathered)
        if result.name is not None:
            if (name := names.get(result.name)) is not None:
                yield name, _as_stored(model, name, torch.from_numpy(np.copy(result.weights)), kind)
            continue
        for name in gathered:
            if not packs_as_int4(kind):
                kinds[name] = kind
            kinds.setdefault(name, kind)
        remaining[target] -= 1
        if target in gathered and not remaining[target]:
            yield target, _as_stored(model, target, gathered.pop(target), kinds[target])
    for name, weights in gathered.items():
        yield name, _as_stored(model, name, weights, kinds[name])


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

    Transformers' treatment is applied to the numbers of the rows, and to those of the columns.
    """
    inputs, rows = (int(size) for size in tensor.shape)
    numbers = np.arange(rows, dtype=np.int32)
    found: list[torch.Tensor] = []
    for axis in (numbers[:, None], np.arange(inputs, dtype=np.int32)[None]):
        values = np.broadcast_to(axis, (rows, inputs))
        result = process(tensor, values, {})
        if result.name is None or names.get(result.name) != target:
            return None
        if result.weights is values and not found:
            return numbers.astype(np.int64)
        weights = torch.from_numpy(np.ascontiguousarray(result.weights))
        found.append(_oriented(target, weights, model))
    by_row, by_column = found
    columns = torch.arange(inputs, dtype=torch.int32)
    if by_row.shape != (rows, inputs) or not torch.equal(by_row, by_row[:, :1].expand_as(by_row)):
        return None
    if not torch.equal(by_column, columns.expand_as(by_column)):
        return None
    return by_row[:, 0].numpy().astype(np.int64)


def _as_stored(
    model: Any, name: str, weights: torch.Tensor, kind: GGMLQuantizationType
) -> PackedMatrix | torch.Tensor:
    """Weights that were dequantised: packed again, or as they are if they were not quantised."""
    if kind in UNQUANTISED:
        return weights.to(UNQUANTISED[kind])
    if _child(model, name) is None:
        return weights
    return quantise(_oriented(name, weights, model), "int4" if packs_as_int4(kind) else "int8")


def _child(model: Any, name: str) -> nn.Module | None:
    """The module of a parameter, if it can be packed."""
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

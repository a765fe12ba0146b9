"""Write the weights of GGUF files as packed folders; see `rap_env.models.files.packed_folder`."""

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

from rap_env.errors import UnsupportedModelError
from rap_env.models.files.gguf_blocks import UNQUANTISED, packed_blocks, packs_as_int4
from rap_env.models.files.gguf_reader import GgufFile
from rap_env.models.files.packed_folder import PACKED_FILE, model_without_weights, require_all
from rap_env.models.weights.packed_modules import is_packable, matrices_of
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import quantise


def write_packed(file: GgufFile, config: Any, folder: Path) -> str:
    """Write the weights of a GGUF file to a folder, packed as `models.files.gguf_blocks` says.

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

    skeleton = model_without_weights(config, torch.float32)
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
    require_all(skeleton, stored, file.path)
    save_file(stored, folder / PACKED_FILE, {"format": "pt"})
    return type(skeleton).__name__


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

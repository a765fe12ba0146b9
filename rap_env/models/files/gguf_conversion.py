"""Convert GGUF files to model folders: packed ones, or ones that transformers loads."""

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

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.families.adapter import adapter_for, check_family
from rap_env.models.files.gguf_reader import (
    UNQUANTISED,
    GgufFile,
    packed_blocks,
    packs_as_int4,
    transformers_reads,
)
from rap_env.models.files.packed_folder import PACKED_FILE, model_without_weights, require_all
from rap_env.models.weights.packed_modules import is_packable, matrices_of
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import quantise


def convert(path: Path, packed: bool, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder; see `converted_gguf`."""
    file = GgufFile(path)
    with transformers_reads(file):
        config = _read_config(file)
        _tokenizer(file, config).save_pretrained(folder)
        (_pack if packed else _convert)(file, config, folder)


def _convert(file: GgufFile, config: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.path.parent,
        config=config,
        dtype=torch.float32,
        gguf_file=file.path.name,
        local_files_only=True,
    )
    # The tensors are no longer quantised; transformers rejects saving a model marked so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _tokenizer(file: GgufFile, config: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        file.path.parent, gguf_file=file.path.name, local_files_only=True
    )
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


def _pack(file: GgufFile, config: Any, folder: Path) -> None:
    """Write a packed model; one tensor at a time is unpacked at most."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    skeleton = model_without_weights(config, torch.float32)
    stored: dict[str, torch.Tensor] = {}
    for name, content in _contents(file, skeleton):
        expected: torch.Tensor = skeleton.get_parameter(name)
        if isinstance(content, PackedMatrix):
            expected = _oriented(name, expected, skeleton)
        if tuple(content.shape) != tuple(expected.shape):
            raise UnsupportedModelError(
                f"{file.path} does not fit its own config: {name!r} has shape "
                f"{tuple(content.shape)}, and {tuple(expected.shape)} was expected."
            )
        if isinstance(content, PackedMatrix):
            stored |= {f"{name}_{part}": tensor for part, tensor in content.tensors.items()}
        else:
            stored[name] = content
    require_all(skeleton, stored, file.path)
    save_file(stored, folder / PACKED_FILE, {"format": "pt"})
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _contents(file: GgufFile, model: Any) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    names, process = _name_map(file, model)
    remaining = Counter(names.values())  # tensors of the file that become each parameter
    gathered: dict[str, torch.Tensor] = {}  # experts, put together from several tensors
    kinds: dict[str, GGMLQuantizationType] = {}
    for tensor in file.tensors:
        kind = tensor.tensor_type
        target = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight"), ""))
        child = _child(model, target) if target else None
        if child is not None and kind not in UNQUANTISED and len(tensor.shape) == 2:
            row_order = _row_order(tensor, target, model, names, process)
            if row_order is not None:
                yield target, packed_blocks(tensor.data, kind, row_order)
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
        weights = torch.from_numpy(np.ascontiguousarray(result.weights))
        oriented.append(_oriented(target, weights, model))
    by_row, by_column = oriented
    order = by_row[:, 0]
    rows_move = by_row.shape == (rows, inputs) and bool((by_row == order[:, None]).all())
    moved_rows_only = rows_move and bool((by_column == torch.from_numpy(columns)).all())
    return order.numpy().astype(np.int64) if moved_rows_only else None


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

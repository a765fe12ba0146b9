"""Folders with packed weights: written once from a GGUF file, and loaded without widening.

Beside config and tokenizer such a folder has one safetensors file. A packed matrix has codes and
scales there (``model.layers.0.mlp.up_proj.weight_codes`` and ``..._scales``, see
`models.weights.packing`); the type of the codes tells its level. Norms, biases and what cannot be
packed have their usual names and are stored as the GGUF file has them. A tied head is not stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.families.adapter import read_config
from rap_env.models.weights.packed_modules import from_matrices, from_tensors
from rap_env.models.weights.packing import PackedLevel
from rap_env.models.weights.tensors import DTYPES, StoredTensor, read_header

PACKED_FILE = "packed.safetensors"
"""The file that makes a model folder a packed one."""

_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
_LEVELS: dict[torch.dtype, PackedLevel] = {torch.int8: "int8", torch.uint8: "int4"}
_CODES = "_codes"


def is_packed(folder: Path) -> bool:
    """Whether a model folder has packed weights, for `load_native`."""
    return (folder / PACKED_FILE).is_file()


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
        model = model_without_weights(read_config(folder), dtype)
    path = folder / PACKED_FILE
    if not path.is_file():
        raise ModelNotAvailableError(f"{folder} has no {PACKED_FILE}, so it has no packed weights.")
    table = read_header(path)
    require_all(model, table, path)

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


def model_without_weights(config: Any, dtype: torch.dtype) -> Any:
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


def require_all(model: Any, stored: Any, path: Path) -> None:
    """Raise an `UnsupportedModelError` unless each parameter is stored under one of its names."""
    packed = {name.removesuffix(_CODES) for name in stored if name.endswith(_CODES)}
    found = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in packed}
    found |= {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in stored}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in found]
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {len(missing)} tensors that its config requires, such as {missing[0]!r}."
        )

"""A model whose weights stay in their safetensors files until they are read."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import disk_errors
from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.families.adapter import FamilyAdapter, adapter_for
from rap_env.models.files.hub import has_all_weights
from rap_env.models.progress import transformers_bars
from rap_env.models.weights.tensors import DTYPES, StoredTensor, damaged_weights, read_header


def open_weights(
    folder: Path, config: Any, dtype: torch.dtype, work: Path
) -> tuple[Any, dict[str, StoredTensor]]:
    """Build a model without its weights, and find where each weight is stored.

    Transformers loads it, with all modules except the smallest one offloaded to disk, so that names
    and layouts are converted as in any other loading. A tensor whose layout in memory differs from
    the files (the experts of a mixture) is written to `work`.

    Returns:
        The model, with parameters that stay in files on the meta device and real non-persistent
        buffers; and the stored parameters by name, a tied one under each of its names.
    """
    from accelerate.hooks import remove_hook_from_module

    _require_all_files(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelNotAvailableError(
            f"{folder} has no safetensors file, and single layers can be read only from those; "
            "load the model with load_llm() and save it again with llm.model.save_pretrained()."
        )
    header = read_header(min(folder.glob("*.safetensors")))
    kind = Counter(entry["dtype"] for entry in header.values()).most_common(1)[0][0]
    loaded_dtype = DTYPES.get(kind, torch.float32)  # another dtype would read every weight now
    with _quiet("accelerate"), disk_errors(work):
        model, _ = _load(folder, loaded_dtype, device_map=_device_map(config), offload_folder=work)
    index = _offload_index(model)
    remove_hook_from_module(model, recurse=True)
    _set_dtype(model, dtype)
    expected = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    tables = {
        path: read_header(path) for path in {Path(e["safetensors_file"]) for e in index.values()}
    }
    stored = {
        name: _stored(index[name], parameter.dtype, tables) for name, parameter in expected.items()
    }
    shapes = {name: (found.shape, tuple(expected[name].shape)) for name, found in stored.items()}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    _reject_other_shapes(folder, wrong)
    return model.eval().requires_grad_(False), stored


def load_weights(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model of a folder on the CPU; its files must contain every weight."""
    model, report = _load(folder, dtype)
    _reject_other_shapes(folder, {name: (a, b) for name, a, b in report["mismatched_keys"]})
    return model.eval().requires_grad_(False)


def _load(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model, and transformers' loading report."""
    from transformers import AutoModelForCausalLM

    _require_all_files(folder)
    with transformers_bars(shown=False), _readable_weights(folder):
        # Transformers selects the attention: sdpa where the family has it, else eager.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the callers reject them
            **options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{folder} lacks {len(missing)} tensors that its config requires, such as "
            f"{missing[0]!r}; transformers would fill them with random numbers. Save the "
            "model again."
        )
    return model, report


def _set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Set the dtype of all parameters, as if they had been loaded in it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), False))
    for part in (model.config, *(getattr(model.config, n) for n in model.config.sub_configs)):
        part.dtype = dtype


def _device_map(config: Any) -> dict[str, str]:
    """Offload every module to disk except the smallest: transformers rejects offloading all."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    parts = dict(_parts(skeleton, adapter_for(config)))
    places = dict.fromkeys(parts, "disk")
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    places[min((name for name in parts if sizes[name]), key=lambda name: sizes[name])] = "cpu"
    return places


def _parts(model: Any, adapter: FamilyAdapter) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that make up a model: the list of layers, and all modules outside of it."""
    path = f"{adapter.family.decoder}.{adapter.family.layers}".split(".")
    module, prefix = model, ""
    for step in path:
        for name, child in module.named_children():
            if name != step:
                yield prefix + name, child
        module, prefix = getattr(module, step), f"{prefix}{step}."
    yield ".".join(path), module


def _offload_index(model: Any) -> Mapping[str, Mapping[str, str]]:
    """File, name and dtype of every offloaded parameter, from accelerate's hooks."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights = getattr(part, "weights_map", None)
            if weights is not None:
                index: Mapping[str, Mapping[str, str]] = weights.dataset.index
                return index
    return {}


def _stored(
    place: Mapping[str, str], dtype: torch.dtype, tables: Mapping[Path, Mapping[str, Any]]
) -> StoredTensor:
    path = Path(place["safetensors_file"])
    entry = tables[path][place["weight_name"]]
    if entry["dtype"] not in DTYPES:
        raise UnsupportedModelError(
            f"{place['weight_name']!r} in {path} is of type {entry['dtype']}, and only weights of "
            f"{', '.join(DTYPES)} can be read one layer at a time; load the model with load_llm()."
        )
    return StoredTensor(path, entry["at"], tuple(entry["shape"]), DTYPES[entry["dtype"]], dtype)


def _require_all_files(folder: Path) -> None:
    if not has_all_weights(folder):
        raise ModelNotAvailableError(
            f"{folder} has a config but not all its weight files; save the model there again."
        )


def _reject_other_shapes(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    """Reject tensors with another shape than the config's; `wrong` gives both by name."""
    if wrong:
        name, (found, expected) = min(wrong.items())
        raise UnsupportedModelError(
            f"{folder} has {len(wrong)} tensors that do not fit its config: {name!r} has "
            f"shape {tuple(found)}, and {tuple(expected)} was expected."
        )


@contextlib.contextmanager
def _readable_weights(folder: Path) -> Iterator[None]:
    """Turn errors of the safetensors library into errors of this project."""
    try:
        yield
    except Exception as error:
        full = "os error 28" in str(error)  # no space for a converted tensor
        if type(error).__name__ != "SafetensorError" or full:
            raise
        raise damaged_weights(folder, error) from error


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide a logger's warnings: that parameters are on the meta device is intended."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

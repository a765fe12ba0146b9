"""A model whose weights stay in their safetensors files until somebody reads them."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import disk_errors
from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.llm.adapter import FamilyAdapter, adapter_for
from rap_env.llm.hub import has_all_weights
from rap_env.llm.progress import transformers_bars
from rap_env.llm.stored import DTYPES, StoredTensor, damaged, read_table


def open_weights(
    folder: Path, config: Any, dtype: torch.dtype, work: Path
) -> tuple[Any, dict[str, StoredTensor]]:
    """Build a model without its weights, and find every one of them.

    Transformers' own loading does it, with all modules but the smallest one offloaded to the
    disk: so names and layouts are converted as in any other loading. A tensor that has another
    layout in memory than in the files (the experts of a mixture) is written anew, to `work`.

    Args:
        folder: Where transformers saved the model, as safetensors.
        config: Its config.
        dtype: Dtype of the weights.
        work: An empty folder for tensors that have to be converted.

    Returns:
        The model: parameters that stay in files are on the meta device, non-persistent buffers
        are real. And where the parameters are, by name; a tied one under each of its names.

    Raises:
        ModelNotAvailableError: Weights are missing, or not saved as safetensors.
        ChecksumError: A file is truncated or damaged.
        UnsupportedModelError: The weights do not fit the config.
        StorageFullError: The disk is full.
    """
    from accelerate.hooks import remove_hook_from_module

    require_all_files(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelNotAvailableError(
            f"{folder} has no safetensors file, the only kind that layers can be read from one at "
            "a time; load the model with load_llm() and save it anew with save_pretrained()."
        )
    model, report = _load_offloaded(folder, config, work)
    refuse_missing(folder, report)
    index = _offload_index(model)
    remove_hook_from_module(model, recurse=True)
    _set_dtype(model, dtype)
    expected = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    tables = {
        path: read_table(path) for path in {Path(e["safetensors_file"]) for e in index.values()}
    }
    stored = {
        name: _stored(index[name], parameter.dtype, tables) for name, parameter in expected.items()
    }
    _refuse_other_shapes(folder, expected, stored)
    return model.eval().requires_grad_(False), stored


def _load_offloaded(folder: Path, config: Any, work: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    first = read_table(min(folder.glob("*.safetensors")))
    stored = Counter(entry["dtype"] for entry in first.values()).most_common(1)[0][0]

    with transformers_bars(shown=False), _quiet("accelerate"), disk_errors(work), readable(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(stored, torch.float32),  # in another one, every weight is read now
            device_map=_device_map(config),
            offload_folder=work,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by the caller, in one sentence
        )
    model, report = loaded
    return model, report


def _set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Say that all parameters are wanted in a dtype, as if they had been loaded in it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), False))
    for part in (model.config, *(getattr(model.config, n) for n in model.config.sub_configs)):
        part.dtype = dtype


def _device_map(config: Any) -> dict[str, str]:
    """Every module on the disk but the smallest: transformers refuses to offload all."""
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
    """Modules that make up a model: the list of layers, and what lies beside the way to it."""
    path = f"{adapter.family.decoder}.{adapter.family.layers}".split(".")
    module, prefix = model, ""
    for step in path:
        for name, child in module.named_children():
            if name != step:
                yield prefix + name, child
        module, prefix = getattr(module, step), f"{prefix}{step}."
    yield ".".join(path), module


def _offload_index(model: Any) -> Mapping[str, Mapping[str, str]]:
    """File, name and dtype of every offloaded parameter, which accelerate's hooks hold."""
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
            f"{', '.join(DTYPES)} can be read a layer at a time; load the model with load_llm()."
        )
    return StoredTensor(path, entry["at"], tuple(entry["shape"]), DTYPES[entry["dtype"]], dtype)


def _refuse_other_shapes(
    folder: Path, expected: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor]
) -> None:
    wrong = sorted(n for n, found in stored.items() if found.shape != tuple(expected[n].shape))
    if wrong:
        raise UnsupportedModelError(
            f"{folder} holds {len(wrong)} tensors that do not fit its config: {wrong[0]!r} has "
            f"shape {stored[wrong[0]].shape}, and {tuple(expected[wrong[0]].shape)} was expected."
        )


def require_all_files(folder: Path) -> None:
    """Refuse a folder without all of its weight files.

    Raises:
        ModelNotAvailableError: Some are missing.
    """
    if not has_all_weights(folder):
        raise ModelNotAvailableError(
            f"{folder} has a config but not all its weights; save the model there again."
        )


def refuse_missing(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse weights that lack what the config asks for, by transformers' loading report.

    Raises:
        UnsupportedModelError: Some are missing.
    """
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{folder} lacks {len(missing)} tensors that its config asks for, {missing[0]!r} for "
            "one; transformers would fill them with random numbers."
        )


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Say in one sentence that a safetensors file cannot be read."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        if "os error 28" in str(error):  # a converted tensor did not fit on the disk
            raise OSError(errno.ENOSPC, str(error)) from error
        raise damaged(folder, error) from error


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors from a logger: that parameters are on the meta device is what is wanted."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

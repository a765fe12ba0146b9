"""Models as transformers loads them from a folder: whole, or with their layers left on disk."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rap_env.artifacts import disk_errors
from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.families.adapter import FamilyAdapter, adapter_for, read_config
from rap_env.models.files.hub import has_all_weights
from rap_env.models.progress import transformers_bars
from rap_env.models.weights.tensors import damaged_weights, read_header, stored_dtype


def load_offloaded(folder: Path, dtype: torch.dtype, device: torch.device, work: Path) -> Any:
    """The transformers model of a folder, with all decoder layers offloaded to disk.

    accelerate's hooks read the weights of a module in a layer when it is called, and free
    them afterwards. A tensor whose layout in memory differs from the files (the experts of a
    mixture) is written to `work`.
    """
    config = read_config(folder)
    adapter = adapter_for(config)
    # In another dtype all weights would be read and written now.
    stored = stored_dtype(folder)
    # "on the meta device".
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    with disk_errors(work):
        model, _ = load_complete(
            folder, stored, device_map=_layers_on_disk(config, adapter, device), offload_folder=work
        )
    weights = offloaded_weights(model)
    weights.device = None  # they are read on the CPU, and sent from there
    files = {entry["safetensors_file"] for entry in weights.index.values()}
    tables = {file: read_header(Path(file)) for file in files}
    shapes = {
        name: tuple(tables[entry["safetensors_file"]][entry["weight_name"]]["shape"])
        for name, entry in weights.index.items()
    }
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if p.is_meta}
    wrong = {name: (shapes[name], shape) for name, shape in parameters.items()}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    _reject_other_shapes(folder, wrong)
    del model.hf_device_map
    _remove_hooks(m for m in model.modules() if not any(p.is_meta for p in m.parameters(False)))
    _set_dtype(model, dtype)
    return model.eval().requires_grad_(False)


def _remove_hooks(modules: Iterable[nn.Module]) -> None:
    """Remove accelerate's hooks from modules, and the `forward` that they leave there."""
    from accelerate.hooks import remove_hook_from_module

    for module in modules:
        remove_hook_from_module(module)
        left = getattr(module.__dict__.get("forward"), "__func__", None)
        if left is type(module).forward:  # a shallow copy would run that of the original
            del module.forward


def offloaded_weights(model: Any) -> Any:
    """Accelerate's mapping of names to the weights that its hooks read."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    return next(weights.dataset for weights in maps if weights is not None)


def load_weights(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model of a folder on the CPU; its files must contain every weight."""
    model, _ = load_complete(folder, dtype)
    return model.eval().requires_grad_(False)


def load_complete(
    folder: Path, dtype: torch.dtype, model_class: Any = None, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """Load a model all of whose tensors are in a folder's files, in their shapes.

    Args:
        folder: The folder.
        dtype: Dtype of the weights.
        model_class: The class; by default the one that the config states.
        **options: As for transformers' ``from_pretrained``.

    Returns:
        The model, and transformers' report of loading.
    """
    if model_class is None:
        from transformers import AutoModelForCausalLM

        model_class = AutoModelForCausalLM
    if not has_all_weights(folder):
        raise ModelNotAvailableError(
            f"{folder} has a config but not all its weight files; save the model there again."
        )
    with transformers_bars(shown=False), _readable_weights(folder):
        # Transformers selects the attention: sdpa where the family has it, else eager.
        loaded: Any = model_class.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below
            **options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{folder} lacks {len(missing)} tensors that its config requires, such as "
            f"{missing[0]!r}; transformers would fill them with random numbers. Save the "
            "model again."
        )
    _reject_other_shapes(folder, {name: (a, b) for name, a, b in report["mismatched_keys"]})
    return model, report


def _set_dtype(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for part in (model.config, *(getattr(model.config, n) for n in model.config.sub_configs)):
        part.dtype = dtype


def _layers_on_disk(config: Any, adapter: FamilyAdapter, device: torch.device) -> dict[str, str]:
    """A device map of all modules outside of the list of layers, and of each layer."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        module = auto.from_config(config)
    places: dict[str, str] = {}
    prefix = ""
    for step in f"{adapter.family.decoder}.{adapter.family.layers}".split("."):
        others = (name for name, _ in module.named_children() if name != step)
        places |= {f"{prefix}{name}": str(device) for name in others}
        module, prefix = getattr(module, step), f"{prefix}{step}."
    return places | {f"{prefix}{number}": "disk" for number in range(adapter.num_layers)}


def _reject_other_shapes(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    """Reject tensors with another shape than the config's; `wrong` gives both by name."""
    if wrong:
        name, (stored, expected) = min(wrong.items())
        raise UnsupportedModelError(
            f"{folder} has {len(wrong)} tensors that do not fit its config: {name!r} has "
            f"shape {tuple(stored)}, and {tuple(expected)} was expected."
        )


@contextlib.contextmanager
def _readable_weights(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        full = "os error 28" in str(error)  # no space for a converted tensor
        if type(error).__name__ != "SafetensorError" or full:
            raise
        raise damaged_weights(folder, error) from error


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer, set up for generation; a `ModelNotAvailableError` if none."""
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotAvailableError(
            f"{folder} has no tokenizer that transformers can read ({error}); save it there with "
            "tokenizer.save_pretrained()."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches of unequal lengths need one
    tokenizer.padding_side = "left"  # generation continues at the right end
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class to read a model folder's tokenizer with.

    Where a folder states the class that converted GGUF files have, transformers would choose
    it too, but import the config of the model's family first, which takes 60 MiB of memory.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = (config["model_type"], stated["tokenizer_class"])
        if known == ("llama", "TokenizersBackend") and "auto_map" not in stated:
            from transformers import TokenizersBackend

            return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer

"""Models as they are read from a folder: by transformers, or tensor by tensor (`load_native`).

A folder with packed weights has one safetensors file beside config and tokenizer. A packed matrix
has codes and scales there (``model.layers.0.mlp.up_proj.weight_codes`` and ``..._scales``, see
`models.weights.packing`); the type of the codes tells its level. Norms, biases and what cannot be
packed have their usual names and are stored as the source has them. A tied head is not stored.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.families.families import adapter_for, read_config
from rap_env.models.files.hub import has_all_weights
from rap_env.models.files.model_folder import file_states
from rap_env.models.progress import transformers_bars
from rap_env.models.weights.packed_modules import from_matrices, from_tensors
from rap_env.models.weights.packing import PackedLevel
from rap_env.models.weights.tensors import (
    StoredTensor,
    check_lengths,
    damaged_weights,
    stored_tensors,
)


def auto_model_class() -> Any:
    """`transformers.AutoModelForCausalLM`, whose models need torch's compiler.

    It is imported in a thread of its own: ``torch.fx.wrap``, which it calls, refers to its own
    frame, and so keeps the frames of all its callers, with any model that one of them returns,
    until a garbage collection.
    """
    from transformers import AutoModelForCausalLM

    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, "torch._dynamo").result()
    return AutoModelForCausalLM


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
    if not has_all_weights(folder):
        raise ModelNotAvailableError(
            f"{folder} has a config but not all its weight files; save the model there again."
        )
    with transformers_bars(shown=False), _readable_weights(folder):
        # Transformers selects the attention: sdpa where the family has it, else eager.
        loaded: Any = (model_class or auto_model_class()).from_pretrained(
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
    reject_other_shapes(folder, {name: (a, b) for name, a, b in report["mismatched_keys"]})
    return model, report


def reject_other_shapes(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
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
    family = _whole_in_json(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if family is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        else:  # `tokenizer.json` is not parsed once more for its added tokens
            options["added_tokens_decoder"] = {}
            tokenizer = transformers.TokenizersBackend.from_pretrained(folder, **options)
            if family == "qwen2":  # as transformers' own class, whatever the file says
                tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotAvailableError(
            f"{folder} has no tokenizer that transformers can read ({error}); save it there with "
            "tokenizer.save_pretrained()."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches of unequal lengths need one
    tokenizer.padding_side = "left"  # generation continues at the right end
    return tokenizer


_WHOLE_IN_JSON = {
    ("gemma3_text", "GemmaTokenizer"),
    ("llama", "TokenizersBackend"),
    ("qwen2", "Qwen2Tokenizer"),
}


def _whole_in_json(folder: Path) -> str | None:
    """The family of a model folder if its `tokenizer.json` has all of its tokenizer, else None.

    That is so where the folder states the class that converted GGUF files have. Transformers
    would import the config of the model's family first, which takes 60 MiB of memory, and
    parse the file twice more, which takes a second for 150,000 tokens.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = (config["model_type"], stated["tokenizer_class"]) in _WHOLE_IN_JSON
        if known and "auto_map" not in stated and (folder / "tokenizer.json").is_file():
            return str(config["model_type"])
    return None


PACKED_FILE = "packed.safetensors"
"""The file that makes a model folder a packed one."""

_LEVELS: dict[torch.dtype, PackedLevel] = {torch.int8: "int8", torch.uint8: "int4"}
_CODES = "_codes"


def is_packed(folder: Path) -> bool:
    """Whether a model folder has packed weights, for `load_native`."""
    return (folder / PACKED_FILE).is_file()


def load_native(
    folder: Path,
    dtype: torch.dtype,
    model: Any = None,
    *,
    unread: torch.device | None = None,
) -> Any:
    """The model of a folder on the CPU, with packed modules in place.

    Args:
        folder: A folder for which `is_packed` or `has_all` holds.
        dtype: Dtype of activations and of all weights that are not packed.
        model: The model without its weights; transformers' own by default.
        unread: If given, the weights of blocks are not read, nor unpacked ones of embeddings
            and head: in their places are tensors of their shapes on this device, which take
            no memory (for `ElasticLLM`).
    """
    from transformers import GenerationConfig

    if unread is None and model is None and not is_packed(folder):
        raise ModelNotAvailableError(f"{folder} has no {PACKED_FILE}, so it has no packed weights.")
    config = read_config(folder) if model is None or unread else None
    if model is None:
        model = model_without_weights(config, dtype)
    stored, cpu = tensors_to_read(folder, dtype), torch.device("cpu")
    require_all(model, stored, folder)
    own = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, own.values()))
    in_blocks: tuple[str, ...] = ()
    embeddings = () if unread is None else _embedding_names(model)
    if unread is not None:
        check_lengths(stored.values())
        adapter = adapter_for(config)
        in_blocks = tuple(
            f"{path}." for n in range(adapter.num_blocks) for path in adapter.module_paths(n)
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        owner, _, part = name.rpartition(".")
        packed = name.rpartition("_")[0] in own
        if not packed and (name not in own or not model.get_parameter(name).is_meta):
            continue  # not the model's, or tied and read under another name
        in_block = name.startswith(in_blocks) and uses[id(own.get(name))] < 2
        if in_block or name in embeddings:
            value = torch.zeros(1, dtype=tensor.dtype, device=unread).expand(tensor.shape)
        else:
            value = tensor.read(cpu)
        if packed:
            parts.setdefault(owner, {})[part] = value
        else:
            _set_parameter(model, name, value)
    for owner, tensors in parts.items():
        _replace(model, owner, tensors)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def tensors_to_read(folder: Path, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """The tensors that `load_native` reads, by name; those that are not packed in a dtype."""
    stored = stored_tensors(folder, PACKED_FILE if is_packed(folder) else "*.safetensors")
    packed = {name.removesuffix(_CODES) for name in stored if name.endswith(_CODES)}
    return {
        name: tensor if name.rpartition("_")[0] in packed else tensor.as_dtype(dtype)
        for name, tensor in stored.items()
    }


def _embedding_names(model: Any) -> list[str]:
    """Names of the weights of embeddings and head, unless other modules have them too."""
    ids = [id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if id(parameter) in ids]
    return names if len(names) == len(ids) else []


def model_without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights

    model_class = auto_model_class()
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _replace(model: Any, owner: str, tensors: dict[str, torch.Tensor]) -> None:
    child, head = model.get_submodule(owner), model.get_output_embeddings()
    codes = next(tensor for name, tensor in tensors.items() if name.endswith(_CODES))
    packed = from_tensors(child, _LEVELS[codes.dtype], tensors)
    if child is not head and getattr(head, "weight", None) is getattr(child, "weight", ()):
        model.set_output_embeddings(from_matrices(head, packed.matrices))
    model.set_submodule(owner, packed)


def _set_parameter(model: Any, name: str, value: torch.Tensor) -> None:
    old, new = model.get_parameter(name), nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def require_all(model: Any, stored: Any, path: Path) -> None:
    """Raise an `UnsupportedModelError` unless each parameter is stored under one of its names."""
    names = {name.removesuffix(_CODES) for name in stored}
    every_name = list(model.named_parameters(remove_duplicate=False))
    shapes = {name: (stored[name].shape, p.shape) for name, p in every_name if name in stored}
    reject_other_shapes(path, {n: pair for n, pair in shapes.items() if pair[0] != pair[1]})
    stored_ids = {id(parameter) for name, parameter in every_name if name in names}
    missing = [name for name, p in model.named_parameters() if id(p) not in stored_ids]
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {len(missing)} tensors that its config requires, such as {missing[0]!r}."
        )


def has_all(model: Any, folder: Path) -> bool:
    """Whether a folder's safetensors files have the parameters of a model under its own names."""
    with contextlib.suppress(UnsupportedModelError):
        require_all(model, stored_tensors(folder) if has_all_weights(folder) else {}, folder)
        return True
    return False


def files_key(source: Path) -> str:
    """Names the present state of the config and the weights in a model folder."""
    weights = [*source.glob("*.safetensors"), *source.glob("*.bin")]
    files = sorted([source / "config.json", *weights])
    return file_states(*files)

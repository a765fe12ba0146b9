"""Models as transformers loads them from a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.files.hub import has_all_weights
from rap_env.models.progress import transformers_bars
from rap_env.models.weights.tensors import damaged_weights


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


_STATED_TOKENIZERS = {("llama", "TokenizersBackend"), ("qwen2", "Qwen2Tokenizer")}


def _tokenizer_class(folder: Path) -> Any:
    """The class to read a model folder's tokenizer with.

    Where a folder states the class that converted GGUF files have, transformers would choose
    it too, but import the config of the model's family first, which takes 60 MiB of memory.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = (config["model_type"], stated["tokenizer_class"])
        if known in _STATED_TOKENIZERS and "auto_map" not in stated:
            return getattr(transformers, stated["tokenizer_class"])
    from transformers import AutoTokenizer

    return AutoTokenizer

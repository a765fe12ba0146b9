"""Models as transformers loads them from a folder."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.files.hub import has_all_weights
from rap_env.models.progress import transformers_bars
from rap_env.models.weights.tensors import damaged_weights


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

"""Convert GGUF files to transformers folders, once for each content, and cache them."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError, UnsupportedModelError
from rap_env.models.families.adapter import adapter_for, check_family
from rap_env.models.files.model_folder import file_sha256, made_once, models_dir
from rap_env.models.progress import transformers_bars

if TYPE_CHECKING:
    from rap_env.models.files.gguf_reader import GgufFile

_CONVERTER = 1
_PACKER = 1
"""Parts of folders' names: increase them when the result of a conversion changes."""


def gguf_folder_name(sha256: str, *, packed: bool = False) -> str:
    """The name of the folder in `models_dir()` for a GGUF file with this content."""
    kind = f"packed-v{_PACKER}" if packed else f"v{_CONVERTER}"
    return f"gguf-{sha256[:16]}-{kind}"


def converted_gguf(
    path: Path, sha256: str | None = None, *, packed: bool = False, progress: bool = True
) -> Path:
    """The folder with the model of a GGUF file, converted at the first call.

    Args:
        path: The file.
        sha256: Its SHA-256, in hex, if it was already computed.
        packed: Keep the file's own bits, for `rap_env.models.files.packed_folder.load_native`; else
            quantised tensors become the float32 values that they represent, so that the folder
            takes 4 bytes per parameter and transformers can load it.
        progress: Show progress bars on a terminal.

    Raises:
        ModelNotAvailableError: There is no such file.
        ChecksumError: It is not a GGUF file, or truncated.
        UnsupportedModelError: Its family is not known; nothing was converted.
        StorageFullError: The disk is full.
    """
    if not path.is_file():
        raise ModelNotAvailableError(f"There is no GGUF file {path}; check the path.")
    sha256 = sha256 or file_sha256(path)
    what = "Packing {} (once; a few" if packed else "Converting {} (once; about ten"
    return made_once(
        models_dir() / gguf_folder_name(sha256, packed=packed),
        functools.partial(_fill, path, sha256, packed, progress),
        f"{what.format(path.name)} seconds for 100 million parameters)",
    )


def _fill(path: Path, sha256: str, packed: bool, progress: bool, folder: Path) -> dict[str, Any]:
    """Write the model of a GGUF file into an empty folder."""
    with transformers_bars(shown=progress and sys.stderr.isatty()):
        (_pack if packed else _convert)(path, folder)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "gguf")}
    return {"file": path.name, "sha256": sha256, **versions}


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rap_env.models.files.gguf_reader import GgufFile, transformers_reads

    file = GgufFile(path)
    with transformers_reads(file):
        config = _read_config(file)
        _tokenizer(file, config).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            dtype=torch.float32,
            gguf_file=path.name,
            local_files_only=True,
        )
    # The tensors are no longer quantised; transformers rejects saving a model marked so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _pack(path: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    from rap_env.models.files.gguf_packing import write_packed
    from rap_env.models.files.gguf_reader import GgufFile, transformers_reads

    file = GgufFile(path)
    with transformers_reads(file):
        config = _read_config(file)
        _tokenizer(file, config).save_pretrained(folder)
        config.architectures = [write_packed(file, config, folder)]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _tokenizer(file: GgufFile, config: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        file.path.parent, gguf_file=file.path.name, local_files_only=True
    )
    _correct_tokenizer(tokenizer, file.value("tokenizer.ggml.pre"), config)
    return tokenizer


def _read_config(file: GgufFile) -> Any:
    """The config of the model in a file.

    Raises:
        ChecksumError: The file holds no language model.
        UnsupportedModelError: Its family is not known.
    """
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

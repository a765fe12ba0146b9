"""Model folders in the cache: made once, whole or not at all, checked at each use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from rap_env.artifacts import disk_errors, load_artifact, save_artifact
from rap_env.errors import ArtifactError, StorageFullError
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)

MANIFEST = "rap_manifest.json"
_KIND = "rap-env.model-folder"
_VERSION = 1


def models_dir() -> Path:
    """Where downloaded and converted models lie."""
    return cache_dir() / "models"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Path) -> bool:
    """Whether a folder is there and holds what was put there when it was made.

    A file whose size and time are those of the manifest is believed; one with another time (the
    cache was copied) is hashed. A bit that rots unseen shows in the model's fingerprint.
    """
    try:
        manifest = load_artifact(folder / MANIFEST, _KIND, _VERSION)
        return all(_matches(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ArtifactError, KeyError):
        return False


def manifest_source(folder: Path) -> dict[str, Any]:
    """What `make` noted as the source of a folder that `made_once` made.

    Raises:
        FileNotFoundError: It is no such folder.
        ArtifactError: Its manifest is damaged.
    """
    source: dict[str, Any] = load_artifact(folder / MANIFEST, _KIND, _VERSION)["source"]
    return source


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder, made now if it is not there or damaged.

    A half-made folder never shows: it is filled beside its place and moved there at the end.
    Several processes may ask at once; one makes it and the others wait. What a killed process
    left behind is removed.

    Args:
        folder: Its place.
        make: Fills an empty folder and returns what to note in the manifest as its source.

    Raises:
        StorageFullError: The disk is full; nothing is left of the attempt.
    """
    if is_intact(folder):
        return folder
    with locked(folder):
        if is_intact(folder):
            return folder
        if folder.exists():
            log.warning("%s is damaged; it is made again", folder)
        with scratch(folder) as work:
            source = make(work)
            files = {path.name: _entry(path) for path in sorted(work.iterdir())}
            save_artifact(work / MANIFEST, _KIND, _VERSION, {"files": files, "source": source})
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
    return folder


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from making `target` at the same time; a killed holder lets go."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        log.info("Another process is making %s; waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, removed afterwards unless it was moved away.

    Call it under `locked(target)` only: what earlier, killed attempts left is removed first.

    Raises:
        StorageFullError: The disk is full.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.part-"
        for leftover in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = target.parent / f"{prefix}{os.getpid()}"
        work.mkdir()
        try:
            yield work
        except OSError:
            raise
        except Exception as error:
            # safetensors reports a failed write as an error of its own, with the text alone.
            if "No space left" not in str(error) and "os error 28" not in str(error):
                raise
            raise StorageFullError(
                f"No space left while writing {target}; free some and run the same command again."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    facts = path.stat()
    return {
        "bytes": facts.st_size,
        "modified_ns": facts.st_mtime_ns,
        "sha256": file_sha256(path),
    }


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    facts = path.stat()
    if facts.st_size != entry["bytes"]:
        return False
    return bool(facts.st_mtime_ns == entry["modified_ns"] or file_sha256(path) == entry["sha256"])

"""Model folders in the cache: created once, complete or not at all, and checked at each use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import filelock

from rap_env.artifacts import digest, disk_errors, load_artifact, save_artifact
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "rap_manifest.json"
_KIND = "rap-env.model-folder"
_HASH_KIND = "rap-env.file-hash"
_VERSION = 1


_apart: ContextVar[bool] = ContextVar("apart", default=False)


@contextlib.contextmanager
def made_apart() -> Iterator[None]:
    """Let `made_once` fill folders in a process of its own in a ``with`` block.

    A conversion imports libraries and takes memory that its process keeps.
    """
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def models_dir() -> Path:
    """The folder of downloaded and converted models."""
    return cache_dir() / "models"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_states(*paths: Path) -> str:
    """Names the present state of some files without reading them."""
    facts = [(str(path.resolve()), path.stat()) for path in paths]
    states = [(path, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in facts]
    return digest(states)[:16]


def remembered(key: str, make: Callable[[], str]) -> str:
    """A hash that was made for a state of files, or is made now."""
    path = cache_dir() / "hashes" / f"{key}.json"
    with contextlib.suppress(OSError, ArtifactError):
        return str(load_artifact(path, _HASH_KIND, _VERSION)["hash"])
    made = make()
    save_artifact(path, _HASH_KIND, _VERSION, {"hash": made})
    return made


def is_intact(folder: Path) -> bool:
    """Whether a folder exists and its files are those of its manifest.

    A file with the size and time of the manifest is accepted; one with another time (the
    cache was copied) is hashed. Silent corruption of a file changes the model's fingerprint.
    """
    try:
        manifest = load_artifact(folder / MANIFEST, _KIND, _VERSION)
        return all(_matches(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ArtifactError, KeyError):
        return False


def manifest_source(folder: Path) -> dict[str, Any]:
    """The source of a folder that `made_once` created, from its manifest."""
    source: dict[str, Any] = load_artifact(folder / MANIFEST, _KIND, _VERSION)["source"]
    return source


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]], announcement: str) -> Path:
    """The folder, created now if it is missing or damaged.

    An incomplete folder is never visible: it is filled under another name and moved at the
    end. If several processes call this concurrently, one creates the folder and the others
    wait. Leftovers of killed processes are removed.

    Args:
        folder: Path of the folder.
        make: Fills an empty folder and returns its source for the manifest. It can be
            pickled.
        announcement: What is logged before.
    """
    if is_intact(folder):
        return folder
    with locked(folder):
        if is_intact(folder):
            return folder
        if folder.exists():
            log.warning("%s is damaged; it is created again", folder)
        with scratch(folder) as work:
            log.info(announcement)
            source = in_child(make, work) if _apart.get() else make(work)
            files = {path.name: _entry(path) for path in sorted(work.iterdir())}
            save_artifact(work / MANIFEST, _KIND, _VERSION, {"files": files, "source": source})
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
    return folder


def in_child(make: Callable[..., T], *args: Any) -> T:
    """The result of a call in a process of its own, whose memory returns to the system.

    Unlike a process of `multiprocessing`, it does not import the main module of this one, which
    may be a script without a guard. An error of the call is raised here.

    Args:
        make: A function that can be pickled, as can its result and its errors.
        *args: Its arguments, which can be pickled.

    Raises:
        ModelNotAvailableError: The process was ended from outside.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-c", f"import {__name__} as own; own._answer()"],
        input=pickle.dumps((make, args)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if child.returncode:
        raise ModelNotAvailableError(
            "A process that converts or prepares the model was ended from outside; is there enough "
            "memory? Convert the model with `rap fetch` before it is served, or bound "
            "`rap prepare` by --memory; run the same command again, and it goes on where it was."
        )
    result, error = pickle.loads(child.stdout)
    if error is not None:
        raise error
    return cast("T", result)


def _answer() -> None:
    """Make the call that comes from `in_child`, and send back its result or error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # its traceback would hide the caller's
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        make, args = pickle.load(sys.stdin.buffer)
        result, raised = None, None
        try:
            result = make(*args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            raised = error
        pickle.dump((result, raised), answers)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from creating `target` at the same time; a killed process unlocks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{target.name}.lock"):
        yield


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty folder in the parent of `target`, removed afterwards unless it was moved.

    Leftovers of processes that have ended are removed first. Call it under `locked(target)`
    where several processes may fill the same folder.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.part-"
        for leftover in target.parent.glob(f"{prefix}*"):
            pid = leftover.name.removeprefix(prefix)
            if pid == str(os.getpid()) or not Path("/proc", pid).exists():
                shutil.rmtree(leftover, ignore_errors=True)
        work = target.parent / f"{prefix}{os.getpid()}"
        work.mkdir()
        try:
            yield work
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

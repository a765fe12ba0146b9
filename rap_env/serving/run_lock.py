"""Locks on the files that a server writes, so that two servers do not write the same ones."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from rap_env.errors import ServingSettingsError
from rap_env.serving.settings import ServerSettings

_WRITTEN = ("decisions", "log_file")
"""Settings that name a file to which a server appends."""


@contextlib.contextmanager
def written_files_locked(settings: ServerSettings) -> Iterator[None]:
    """Keep other servers from writing the files of these settings, in a ``with`` block.

    The lock of ``NAME`` is a file ``.NAME.lock`` beside it, which stays and names the process. The
    system releases the lock of a process that was killed.

    Raises:
        ServingSettingsError: Another server writes one of them; the message names the process.
    """
    with contextlib.ExitStack() as held:
        for name in _WRITTEN:
            path = getattr(settings, name)
            if path is not None and (Path(path).is_file() or not Path(path).exists()):
                held.enter_context(_locked(name, Path(path)))
        yield


@contextlib.contextmanager
def _locked(name: str, path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.parent / f".{path.name}.lock"
    owner = _owner(place)  # before the attempt, which truncates the file in some versions
    lock = filelock.FileLock(place)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ServingSettingsError(
            f"{owner} serves with {name} {path} already; stop it, or set {name} to another file."
        ) from None
    try:
        place.write_text(json.dumps({"pid": os.getpid()}), encoding="ascii")
        yield
    finally:
        lock.release()


def _owner(place: Path) -> str:
    """The process that holds a lock, as far as its file tells."""
    try:
        return f"Process {int(json.loads(place.read_text(encoding='ascii'))['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "Another process"

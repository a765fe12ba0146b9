"""Files that are written atomically and checked when read.

A reader never sees a partial file (a rename replaces the old file), and the checksum in an artifact
reveals that it was truncated or edited.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rap_env.errors import ArtifactError, StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk into an error that states what to do.

    Raises:
        StorageFullError: The disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFullError(
            f"No space left while writing {os.fspath(path)}; free some and run the same command "
            "again: everything saved before is intact."
        ) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` only if the block succeeds.

    Raises:
        StorageFullError: The disk is full; the previous file at `path` is unchanged.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
        try:
            # tempfile would create a file that only its owner can read.
            with name.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def save_artifact(
    path: str | os.PathLike[str], kind: str, version: int, body: dict[str, Any]
) -> None:
    """Write `body` as an indented JSON file with its kind, version and checksum.

    Raises:
        StorageFullError: The disk is full.
    """
    body = json.loads(canonical_json(body))  # as it will be read: string keys, lists
    document = {"kind": kind, "version": version, "sha256": digest(body), "body": body}
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def load_artifact(path: str | os.PathLike[str], kind: str, version: int) -> dict[str, Any]:
    """Read the body of an artifact that `save_artifact` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactError: It is truncated, altered, of another kind or of another version.
    """
    remedy = "delete it and create it again"
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        document = json.loads(text)
        found, written, checksum = document["kind"], document["version"], document["sha256"]
        body: dict[str, Any] = document["body"]
        content = digest(body)
    except (ValueError, KeyError, TypeError):  # ValueError: no JSON, or NaN in it
        raise ArtifactError(
            f"{path} is truncated or no artifact of this project; {remedy}."
        ) from None
    if found != kind:
        raise ArtifactError(f"{path} is of the kind {found!r}, but {kind!r} was expected.")
    if written != version:
        raise ArtifactError(
            f"{path} has format {written}, but this version reads {version}; {remedy}."
        )
    if content != checksum:
        raise ArtifactError(
            f"{path} was altered after it was written (checksum differs); {remedy}."
        )
    return body

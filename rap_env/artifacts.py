"""Files that are written atomically and checked when read.

A reader never sees a partial file (a rename replaces the old file), and the checksum in an
artifact reveals that it was truncated or edited.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import IO, Any

from rap_env.errors import ArtifactError, CorpusError, StorageFullError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_GZIP = b"\x1f\x8b"  # how every gzip file begins
_DAMAGED = (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of reading a damaged file: no JSON, or NaN in it; no fields; damaged gzip."""


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk or quota into a `StorageFullError` that states what to do.

    Safetensors reports a failed write only in the message of its own error type.
    """
    try:
        yield
    except Exception as error:
        full = any(f"os error {number}" in str(error) for number in _FULL)
        if not (error.errno in _FULL if isinstance(error, OSError) else full):
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


def remove_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left, from a file."""
    with path.open("rb+") as file:
        start = end = file.seek(0, os.SEEK_END)
        tail, step = b"", 1  # nearly always the last byte ends a line
        while start > 0 and b"\n" not in tail:
            start, step = max(0, start - step), 65536
            file.seek(start)
            tail = file.read(end - start)
        whole = start + tail.rfind(b"\n") + 1
        if whole < end:
            log.warning("%s ended in an incomplete line, which was removed.", path)
            file.truncate(whole)


def read_rows(path: Path, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a UTF-8 JSON-lines file, all of which must have the `fields`.

    Raises:
        CorpusError: It cannot be read, is empty, or a line is not an object with these
            fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"Cannot read {path} as UTF-8 text: {error}.") from None
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CorpusError(f"{path} has no rows; it must hold one JSON object per line.")
    return [_parse_row(path, number, line, fields) for number, line in lines]


def _parse_row(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"Line {number} of {path} is not a JSON object ({error}); the file may be truncated."
        ) from None
    if not isinstance(row, dict):
        raise CorpusError(f"Line {number} of {path} is not a JSON object, but {line[:40]!r}.")
    missing = [field for field in fields if not _has(row, field)]
    if missing:
        raise CorpusError(
            f"Line {number} of {path} lacks the field {missing[0]!r}; it has "
            f"{', '.join(map(repr, row)) or 'none'}. Correct the file, or name another field."
        )
    return row


def _has(row: Any, field: str) -> bool:
    """Whether a row has a field, given as names joined by dots."""
    for name in field.split("."):
        if not isinstance(row, dict) or name not in row:
            return False
        row = row[name]
    return True


def package_json(package: str, name: str) -> Any:
    """Content of a JSON file that a package contains."""
    return json.loads(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def save_artifact(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    body: dict[str, Any],
    *,
    compress: bool = False,
) -> None:
    """Write `body` as an indented JSON file with its kind, version and checksum.

    With `compress` it is written as gzip, for large bodies.
    """
    body = json.loads(canonical_json(body))  # as it will be read: string keys, lists
    document = {"kind": kind, "version": version, "sha256": digest(body), "body": body}
    text = _layout(document, "\n").encode() + b"\n"
    with atomic_write(path) as file:
        file.write(gzip.compress(text, mtime=0) if compress else text)


def _layout(value: Any, line: str) -> str:
    """JSON with one entry per line, except that lists of plain values stay on one line.

    `line` is a line break and the indentation of the value.
    """
    nested = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
    )
    if not value or not nested:
        return json.dumps(value, allow_nan=False)
    inner = line + " "
    if isinstance(value, dict):
        entries = (f"{json.dumps(key)}: {_layout(entry, inner)}" for key, entry in value.items())
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}"
    return f"[{inner}{f',{inner}'.join(_layout(entry, inner) for entry in value)}{line}]"


def artifact_kind(path: str | os.PathLike[str]) -> str | None:
    """The kind of an artifact that `save_artifact` wrote; None if the file is none or damaged.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        return str(_document(path)["kind"])
    except _DAMAGED:
        return None


def _document(path: str | os.PathLike[str]) -> Any:
    content = Path(path).read_bytes()
    if content.startswith(_GZIP):
        content = gzip.decompress(content)
    return json.loads(content.decode(errors="replace"))


def load_artifact(path: str | os.PathLike[str], kind: str, version: int) -> dict[str, Any]:
    """Read the body of an artifact that `save_artifact` wrote, compressed or not.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactError: It is truncated, altered, of another kind or of another version.
    """
    remedy = "delete it and create it again"
    try:
        document = _document(path)
        actual_kind, written, checksum = document["kind"], document["version"], document["sha256"]
        body: dict[str, Any] = document["body"]
        actual = digest(body)
    except _DAMAGED:
        raise ArtifactError(
            f"{path} is truncated or no artifact of this project; {remedy}."
        ) from None
    if actual_kind != kind:
        raise ArtifactError(f"{path} is of the kind {actual_kind!r}, but {kind!r} was expected.")
    if written != version:
        raise ArtifactError(
            f"{path} has format {written}, but this version reads {version}; {remedy}."
        )
    if actual != checksum:
        raise ArtifactError(
            f"{path} was altered after it was written (checksum differs); {remedy}."
        )
    return body


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a frozen dataclass from JSON, whose lists are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

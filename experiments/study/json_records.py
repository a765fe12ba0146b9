"""Files of records: one JSON object per line, appended one at a time and readable after any kill.

Each line is written with one call. A torn last line, left by a kill, is dropped; an invalid
line elsewhere means that the file was altered, and raises an error. A file ``NAME.jsonl`` may
be replaced by ``NAME.jsonl.gz``: every function here that reads a file reads either.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rap_env.artifacts import atomic_write, disk_errors, remove_incomplete_line
from rap_env.errors import ArtifactError

logger = logging.getLogger(__name__)


def append_record(path: Path, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Append one record as one line, after removing a torn last line.

    Args:
        path: The file.
        record: The record.
        durable: Whether to wait until the line is on the disk. Otherwise it survives the end
            of the process but not of the machine.

    Raises:
        StorageFullError: The disk is full; earlier records are intact.
        ValueError: A value is not finite or not JSON.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            remove_incomplete_line(path)
            file.write(line)
            file.flush()
            if durable:
                os.fsync(file.fileno())


def stored_file(path: Path) -> Path | None:
    """Return a file, or the compressed file in its place; None if there is neither."""
    compressed = path.with_name(f"{path.name}.gz")
    return next((file for file in (path, compressed) if file.is_file()), None)


def record_files(folder: Path, name: str) -> list[Path]:
    """Return the files of a name at any depth below a folder, for `read_records`."""
    compressed = {file.with_name(name) for file in folder.rglob(f"{name}.gz")}
    return sorted(compressed | set(folder.rglob(name)))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all complete records of a file, in order; none if there is no file.

    Raises:
        ArtifactError: A line other than the last is not a JSON object.
    """
    file = stored_file(path)
    if file is None:
        return []
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    *lines, rest = content.split(b"\n")
    if rest:
        logger.warning("%s ends in an incomplete line, which is ignored.", path)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ArtifactError(
                f"Line {number} of {path} is no JSON record: the file was altered. Restore it, "
                "or delete that line and run the program again."
            )
        records.append(record)
    return records


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these records, atomically; gzip if its name ends so."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    with atomic_write(path) as file:
        file.write(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, atomically.

    Raises:
        StorageFullError: The disk is full; the old file is intact.
    """
    with atomic_write(path) as file:
        file.write(text.encode())


def trim_metrics(path: Path, step: int) -> None:
    """Remove metrics of steps after `step`, because a run that resumes there writes them again."""
    records = read_records(path)
    kept = [record for record in records if record.get("step", 0) <= step]
    if len(kept) < len(records) or (path.exists() and not records):
        write_records(path, kept)


def read_json(path: Path, *, made_by: str) -> dict[str, Any] | None:
    """Read a JSON file; None if there is no file.

    Args:
        path: The file.
        made_by: What writes the file, for the error message.

    Raises:
        ArtifactError: It is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged; delete the file and run {made_by} again.")
    return content

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
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from rap_env.artifacts import atomic_write, digest, disk_errors, remove_incomplete_line
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


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of rows, each of which is stored as one JSON object a line.

    A field with a plain default may be left out; other keys must all be there.

    Attributes:
        provenance: ``{"depends_on": hashes and settings, "git": commit}``, and what else
            describes how the row was made.
        file: Name of the file of such rows in a run folder.
        record_name: What error messages call a record, at the start of a sentence.
        identity: Fields and properties that tell the rows of a file apart.
    """

    file: ClassVar[str] = ""
    record_name: ClassVar[str] = "A record"
    identity: ClassVar[tuple[str, ...]]

    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies a result: a resumed run does not compute a row with the same key again."""
        return row_key((getattr(self, name) for name in self.identity), self.depends_on)

    @property
    def depends_on(self) -> dict[str, Any]:
        """Hashes and settings that the row depends on."""
        return dict(self.provenance.get("depends_on", {}))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Restore what `dataclasses.asdict` made of a record.

        Raises:
            ArtifactError: Keys are missing or unknown.
        """
        known = fields(cls)
        required = {f.name for f in known if f.default is MISSING}
        wrong = sorted((required - record.keys()) | (record.keys() - {f.name for f in known}))
        if wrong:
            raise ArtifactError(
                f"{cls.record_name} has missing or unknown keys: {', '.join(wrong)}; it was "
                "written by another version, so run the program again in a new run folder."
            )
        return cls(**record)

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Read all records of a file, or of `file` in a folder; none if there is no file.

        Raises:
            ArtifactError: The file or one of its records is damaged.
        """
        path = path / cls.file if path.is_dir() and cls.file else path
        return [cls.from_record(record) for record in read_records(path)]


def row_key(identity: Iterable[Any], depends_on: Mapping[str, Any]) -> str:
    """Return the key of a row before it is computed.

    Args:
        identity: What `Record.identity` names.
        depends_on: See `Record.depends_on`.
    """
    return digest([*identity, depends_on])

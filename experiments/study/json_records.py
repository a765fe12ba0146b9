"""Records: one JSON object per line, appended one at a time and readable after any kill.

Each line is written with one call. A torn last line, left by a kill, is dropped; an invalid
line elsewhere means that the file was altered, and raises an error. A file ``NAME.jsonl`` may
be replaced by ``NAME.jsonl.gz``: every function here that reads a file reads either.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from experiments.study.statistics import Estimate, bootstrap_mean
from rap_env.artifacts import atomic_write, digest, disk_errors, remove_incomplete_line
from rap_env.errors import ArtifactError

logger = logging.getLogger(__name__)

Shape = tuple[int, int]
"""Batch size and sequence length in tokens."""

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the native peak."""


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
        return row_key(*(getattr(self, name) for name in self.identity), self.provenance)

    @property
    def depends_on(self) -> dict[str, Any]:
        """Hashes and settings that the row depends on."""
        return dict(self.provenance.get("depends_on", {}))

    def to_record(self) -> dict[str, Any]:
        """Return a plain dict for one JSON line."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Restore what `to_record` returned.

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


@dataclass(frozen=True, kw_only=True)
class RequestRecord(Record):
    """A record of one request.

    Attributes:
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
    """

    request: dict[str, int]

    @property
    def shape(self) -> Shape:
        """Batch size and sequence length in tokens."""
        return self.request["batch_size"], self.request["seq_len_tokens"]


@dataclass(frozen=True, kw_only=True)
class DeltaNLLRecord(Record):
    """A record of the ΔNLL of one plan: its NLL minus that of the native model on the same windows.

    Attributes:
        delta_nll: Mean ΔNLL over the windows of the report text, on which nothing is
            searched, nats per token.
        delta_nll_ci_low: Lower end of its 95 % interval over windows.
        delta_nll_ci_high: Upper end.
        window_delta_nll: ΔNLL of each window of the report text, (windows,).
    """

    delta_nll: float
    delta_nll_ci_low: float
    delta_nll_ci_high: float
    window_delta_nll: list[float]

    @property
    def estimate(self) -> Estimate:
        """ΔNLL with its interval."""
        return Estimate(self.delta_nll, self.delta_nll_ci_low, self.delta_nll_ci_high)


@dataclass(frozen=True, kw_only=True)
class CellRecord(RequestRecord, DeltaNLLRecord):
    """A record of one plan at one cell: a request at a budget.

    Attributes:
        budget_fraction: Budget as a fraction of the native model's peak bytes.
        budget_bytes: The budget itself.
        peak_bytes: Peak bytes of the plan under the request.
    """

    budget_fraction: float
    budget_bytes: int
    peak_bytes: int

    @property
    def cell(self) -> Cell:
        """Batch size, sequence length in tokens and budget fraction."""
        return (*self.shape, self.budget_fraction)


def request_field(shape: Shape) -> dict[str, int]:
    """Return the field `request` of a record."""
    return {"batch_size": shape[0], "seq_len_tokens": shape[1]}


def delta_nll_fields(windows: npt.ArrayLike) -> dict[str, Any]:
    """Return the fields of `DeltaNLLRecord`.

    Args:
        windows: ΔNLL on each window of the text, nats per token, (windows,).
    """
    mean = bootstrap_mean(windows)
    return {
        "delta_nll": mean.mean,
        "delta_nll_ci_low": mean.low,
        "delta_nll_ci_high": mean.high,
        "window_delta_nll": np.asarray(windows, dtype=float).tolist(),
    }


def row_key(*identity: Any) -> str:
    """Return the key of a row before it is computed.

    Args:
        *identity: What `Record.identity` names, and last the provenance of the row, of which
            only what the result depends on counts.
    """
    *values, provenance = identity
    return digest([*values, provenance.get("depends_on", {})])


RowT = TypeVar("RowT", bound=Record)


class RowFile(Generic[RowT]):
    """Rows in a JSON-lines file, each computed only once: a resumed run finds the earlier ones.

    The file need not exist yet.

    Raises:
        ArtifactError: The file or one of its rows is damaged.
    """

    def __init__(self, path: Path, row_type: type[RowT]) -> None:
        self._path = path
        self._rows = {row.key: row for row in row_type.read(path)}

    def has(self, key: str) -> bool:
        """Whether the file has the row with this key."""
        return key in self._rows

    def __getitem__(self, key: str) -> RowT:
        return self._rows[key]

    def get(self, key: str, compute: Callable[[], RowT]) -> RowT:
        """Return the row with this key; compute it and append it if the file has none.

        Raises:
            StorageFullError: The disk is full; earlier rows are intact.
        """
        if key not in self._rows:
            row = compute()
            append_record(self._path, row.to_record())
            self._rows[key] = row
        return self._rows[key]


def set_aside(path: Path, row_type: type[RowT], keys: Collection[str]) -> None:
    """Keep the rows with some keys in a file, and move all others to ``NAME.other.jsonl``.

    Rows that belong to it again return from there.
    """
    aside = path.with_suffix(f".other{path.suffix}")
    rows = {row.key: row for row in [*row_type.read(aside), *row_type.read(path)]}
    others = [row.to_record() for key, row in rows.items() if key not in keys]
    if others:
        write_records(aside, others)
        logger.info(
            "%d rows of methods, texts or budgets that are not evaluated now are kept in %s, and "
            "return from there.",
            len(others),
            aside,
        )
    write_records(path, [row.to_record() for key, row in rows.items() if key in keys])


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

"""Records: one JSON object per line, appended one at a time and readable after any kill.

Each line is written with one call. A torn last line, left by a kill, is dropped; an invalid line
elsewhere means that the file was altered, and raises an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from experiments.comparison.statistics import bootstrap_mean
from experiments.config.common import Cell
from rap_env.artifacts import atomic_write, digest, disk_errors, remove_incomplete_line
from rap_env.blocks import BlockMask
from rap_env.errors import ArtifactError
from rap_env.plan import CompressionPlan, MaskOrPlan

logger = logging.getLogger(__name__)


class Record:
    """Base of dataclasses that are stored as one JSON object a line.

    Fields with a plain default may be missing in older records; other keys must all be there.

    Attributes:
        record_name: What error messages call a record, at the start of a sentence.
        rerun: What to do in a new run folder if a record is of another version.
        dropped_keys: Keys of older records that are read and ignored.
        identity: Fields and properties that tell the rows of a file apart.
    """

    record_name: ClassVar[str] = "A record"
    rerun: ClassVar[str] = "run the program again"
    dropped_keys: ClassVar[frozenset[str]] = frozenset()
    identity: ClassVar[tuple[str, ...]]

    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        """Identifies a result: a resumed run does not compute a row with the same key again."""
        return row_key(*(getattr(self, name) for name in self.identity), self.provenance)

    def to_record(self) -> dict[str, Any]:
        """Return a plain dict for one JSON line."""
        return asdict(cast("Any", self))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Restore what `to_record` returned.

        Raises:
            ArtifactError: Keys are missing or unknown.
        """
        known = fields(cast("Any", cls))
        required = {f.name for f in known if f.default is MISSING}
        kept = {name: value for name, value in record.items() if name not in cls.dropped_keys}
        wrong = sorted((required - kept.keys()) | (kept.keys() - {f.name for f in known}))
        if wrong:
            raise ArtifactError(
                f"{cls.record_name} has missing or unknown keys: {', '.join(wrong)}; it was "
                f"written by another version, so {cls.rerun} in a new run folder."
            )
        return cls(**kept)

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Read all records of a file; none if there is no file.

        Raises:
            ArtifactError: The file or one of its records is damaged.
        """
        return [cls.from_record(record) for record in read_records(path)]


class CellRecord(Record):
    """A record of one mask at one cell: a request at a budget.

    Losses are ΔNLL: the mask's NLL minus the dense model's on the same windows, nats per token. The
    fields of every such record:

    Attributes:
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        budget_fraction: Budget as a fraction of the dense model's peak bytes.
        budget_bytes: The budget itself.
        peak_bytes: Peak bytes of the mask under the request, stubs included.
        mask: Names of the removed blocks.
        loss: ΔNLL, mean over the windows of the report text, on which no mask is searched.
        loss_ci_low: Lower end of its 95 % interval over windows.
        loss_ci_high: Upper end.
        window_losses: ΔNLL of each window of the report text, (windows,).
    """

    request: dict[str, int]
    budget_fraction: float

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and sequence length in tokens."""
        return self.request["batch_size"], self.request["seq_len_tokens"]

    @property
    def cell(self) -> Cell:
        """Batch size, sequence length in tokens and budget fraction."""
        return (*self.shape, self.budget_fraction)


def delta_nll_fields(windows: npt.ArrayLike) -> dict[str, Any]:
    """Return the fields of a row that describe a mask's ΔNLL: mean, 95 % interval, windows.

    Args:
        windows: ΔNLL on each window of the text, nats per token, (windows,).
    """
    mean = bootstrap_mean(windows)
    return {
        "loss": mean.mean,
        "loss_ci_low": mean.low,
        "loss_ci_high": mean.high,
        "window_losses": np.asarray(windows, dtype=float).tolist(),
    }


def row_key(*identity: Any) -> str:
    """Return the key of a row before it is computed.

    Args:
        *identity: What `Record.identity` names, and last the provenance of the row, of which only
            what the result depends on counts.
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


def append_record(path: Path, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Append one record as one line, after removing a torn last line.

    Args:
        path: The file.
        record: The record.
        durable: Whether to wait until the line is on the disk. Otherwise it survives the end of
            the process but not of the machine.

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


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all complete records of a file, in order; none if there is no file.

    Raises:
        ArtifactError: A line other than the last is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
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
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is damaged; delete the file and run {made_by} again.")
    return found


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these records, atomically."""
    with atomic_write(path) as file:
        for record in records:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def trim_metrics(path: Path, step: int) -> None:
    """Remove metrics of steps after `step`, because a run that resumes there writes them again."""
    records = read_records(path)
    kept = [record for record in records if record.get("step", 0) <= step]
    if len(kept) < len(records) or (path.exists() and not records):
        write_records(path, kept)


PARTS = ("grid", "sparsity", "outside")
"""Parts of an evaluation, never averaged together: the grid of requests and budgets, cells at a
fixed sparsity, and cells outside the training range of policies."""


@dataclass(frozen=True)
class ResultRow(CellRecord):
    """Result of one method and seed at one cell: a line of ``results.jsonl``.

    For the other fields see `CellRecord`.

    Attributes:
        method: Name of the baseline, or of the trained agent's run without its seed.
        kv_aware: Whether the method counts the KV cache when it chooses.
        seed: Seed of the agent or of the random baseline; None where nothing is drawn.
        fits: Whether the peak is within the budget.
        attn_removed: Number of removed attn blocks.
        ffn_removed: Number of removed ffn blocks.
        loss_calibration: ΔNLL on the calibration text, which methods may have used.
        accuracies: Accuracy of each task in [0, 1]; empty without tasks.
        decision_s: Seconds from the request to the mask or plan.
        evaluations: Masks or plans scored by the model for this request.
        setup_evaluations: Masks or plans scored once, before any request.
        provenance: Hashes, versions and commit that the numbers depend on.
        sparsity: Share of the block bytes to free, for cells defined by it; None on the grid.
        outside: Whether the cell is outside the training range of policies.
        training_s: Seconds of training; None if not recorded.
        levels: Levels of all items that are not native, by name; None where methods choose masks.
        target_loss: ΔNLL that the cell's budget stands for, nats per token; None if it stands for
            none.
        accuracies_norm: lm-eval's ``acc_norm`` of the tasks that have it, as `accuracies` is
            ``acc``; None in older records.
        task_documents: Number of documents of each task; None in older records.
    """

    method: str
    kv_aware: bool
    seed: int | None
    request: dict[str, int]
    budget_fraction: float
    budget_bytes: int
    peak_bytes: int
    fits: bool
    attn_removed: int
    ffn_removed: int
    mask: list[str]
    loss_calibration: float
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]
    accuracies: dict[str, float]
    decision_s: float
    evaluations: int
    setup_evaluations: int
    provenance: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    outside: bool = False
    training_s: float | None = None
    levels: dict[str, str] | None = None
    target_loss: float | None = None
    accuracies_norm: dict[str, float] | None = None
    task_documents: dict[str, int] | None = None

    record_name = "A result record"
    rerun = "run the evaluation again"
    identity = ("method", "seed", "cell", "part")

    @property
    def part(self) -> str:
        """Part of the evaluation that the cell belongs to, one of `PARTS`."""
        return "outside" if self.outside else "grid" if self.sparsity is None else "sparsity"

    @property
    def plan(self) -> MaskOrPlan:
        """The mask, or the plan where methods choose plans."""
        if self.levels is None:
            return BlockMask.of(*self.mask)
        return CompressionPlan.of(self.levels)

    @property
    def mean_accuracy(self) -> float | None:
        """Mean accuracy over tasks; None without tasks."""
        if not self.accuracies:
            return None
        return sum(self.accuracies.values()) / len(self.accuracies)


def read_rows(path: Path) -> list[ResultRow]:
    """Read all rows of a ``results.jsonl``."""
    return ResultRow.read(path)


def rows_below(folder: Path) -> list[ResultRow]:
    """Read all rows of the ``results.jsonl`` at any depth below a folder."""
    return [row for path in sorted(folder.rglob("results.jsonl")) for row in read_rows(path)]

"""The harness of all records: rows, what measures each of them once, and a study of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.study.console import say
from experiments.study.json_records import (
    Record,
    append_record,
    row_key,
    write_records,
    write_text,
)
from experiments.study.run_folder import RunFolder, git_state
from experiments.study.statistics import Estimate, bootstrap_mean
from experiments.study.table_format import TitledTable, document, rendered
from rap_env.models.progress import progress_bar

logger = logging.getLogger(__name__)


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


RowT = TypeVar("RowT", bound=Record)


@dataclass(frozen=True)
class Job(Generic[RowT]):
    """A row that belongs to a study, before it is measured.

    Attributes:
        row_type: Type of the row; its `Record.file` is where it is stored.
        identity: Values of what `Record.identity` names, in that order.
        depends_on: Hashes and settings that the row depends on. A row is measured once for
            each identity and `depends_on`.
        make: Measures the row; its provenance is added.
    """

    row_type: type[RowT]
    identity: tuple[Any, ...]
    depends_on: Mapping[str, Any]
    make: Callable[[], RowT]

    @cached_property
    def key(self) -> str:
        """The key that the row will have."""
        return row_key(self.identity, self.depends_on)


def measured(jobs: Sequence[Job[Any]], folder: Path, name: str, progress: bool) -> list[Any]:
    """Return the rows of all jobs, in their order; rows that the folder lacks are measured.

    Args:
        jobs: The jobs.
        folder: The run folder.
        name: Name of the study, for the progress bar.
        progress: Whether to show progress.

    Raises:
        ArtifactError: A file or one of its rows is damaged.
        StorageFullError: The disk is full; earlier rows are intact.
    """
    files = {kind: kind.read(folder / kind.file) for kind in {job.row_type for job in jobs}}
    rows = {(kind, row.key): row for kind, known in files.items() for row in known}
    missing = [job for job in jobs if (job.row_type, job.key) not in rows]
    if missing:
        say(f"{name}: {len(missing)} of {len(jobs)} rows are to be measured.")
    git, done = git_state(), len(jobs) - len(missing)
    with progress_bar(progress, total=len(jobs), initial=done, desc=name, unit="row") as bar:
        for job in missing:
            provenance = {"depends_on": dict(job.depends_on), "git": git}
            row = rows[job.row_type, job.key] = replace(job.make(), provenance=provenance)
            append_record(folder / job.row_type.file, asdict(row))
            bar.update()
    return [rows[job.row_type, job.key] for job in jobs]


def set_aside(path: Path, row_type: type[RowT], keys: Collection[str]) -> None:
    """Keep the rows with some keys in a file, and move all others to ``NAME.other.jsonl``.

    Rows that belong to it again return from there.
    """
    aside = path.with_suffix(f".other{path.suffix}")
    rows = {row.key: row for row in [*row_type.read(aside), *row_type.read(path)]}
    others = [asdict(row) for key, row in rows.items() if key not in keys]
    if others:
        write_records(aside, others)
        logger.info(
            "%d rows of methods, texts or budgets that are not evaluated now are kept in %s, and "
            "return from there.",
            len(others),
            aside,
        )
    write_records(path, [asdict(row) for key, row in rows.items() if key in keys])


@dataclass(frozen=True)
class Study:
    """A study: rows that a program measures, and the tables that are made from them.

    Attributes:
        name: Name of the program, its file in ``conf/`` and its run folder.
        title: Heading of ``tables.md``.
        row_types: Types of its rows, each with a `Record.file`.
        jobs: Returns all rows that belong to the study; called with the settings and run
            folder.
        tables: Makes the tables from the rows.
        frozen: Sections of the settings that must not change when a run resumes.
    """

    name: str
    title: str
    row_types: Sequence[type[Record]]
    jobs: Callable[[Config, Path], Iterable[Job[Any]]]
    tables: Callable[[list[Any]], Sequence[TitledTable]]
    frozen: tuple[str, ...] = ("model",)

    def run(self, config: Config, folder: Path) -> Path:
        """Measure the rows that the folder lacks, then write ``tables.md`` and print the tables.

        Returns:
            The run folder.

        Raises:
            ExperimentError: The folder has results of other settings.
            RapError: As `jobs` and what they measure raise.
        """
        run, started = RunFolder(folder), time.monotonic()
        run.start(config, frozen=self.frozen)
        rows = measured(list(self.jobs(config, folder)), folder, self.name, config.progress)
        run.finish(started, rows=len(rows))
        text = self.markdown(rows)
        write_text(folder / "tables.md", text)
        say(rendered(text))
        say(f"{len(rows)} records are in {folder}.")
        return folder

    def read(self, folder: Path) -> list[Any]:
        """Return all rows in a folder, which need not have any."""
        return [row for kind in self.row_types for row in kind.read(folder / kind.file)]

    def markdown(self, rows: list[Any]) -> str:
        """Return title and all tables in Markdown."""
        return f"# {self.title}\n\n{document(self.tables(rows), captions=True)}"

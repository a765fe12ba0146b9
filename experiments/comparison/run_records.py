"""Load the records of run folders: those of one comparison for a report, or of many.

Reports and comparisons are made from records only, without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.comparison.result_rows import PARTS, ResultRow
from experiments.comparison.summaries import Comparison, check_equal
from experiments.comparison.training_runs import TrainingRun
from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import read_json, record_files
from experiments.study.run_folder import RunFolder

_EQUAL = ("model_fingerprint", "dtype", "calibration_sha256", "report_sha256")
"""What the rows of a comparison depend on alike."""


@dataclass(frozen=True)
class Records:
    """All records of one comparison.

    Attributes:
        root: Its folder.
        name: The folder relative to the searched one.
        rows: Result rows, with seconds of training from the training runs.
        evaluations: Folders of its evaluations.
        runs: Training runs.
    """

    root: Path
    name: str
    rows: list[ResultRow]
    evaluations: list[RunFolder]
    runs: list[TrainingRun]

    @cached_property
    def parts(self) -> dict[str, Comparison]:
        """The rows by part of the evaluation, the grid first.

        Raises:
            ArtifactError: They are of different models or texts, which must not be averaged.
        """
        check_equal(self.rows, _EQUAL)
        present = {row.part for row in self.rows}
        return {part: Comparison(self.rows, part) for part in PARTS if part in present}

    @property
    def comparison(self) -> Comparison | None:
        """The grid; None before an evaluation."""
        return self.parts.get("grid")

    @cached_property
    def profile(self) -> dict[str, Any] | None:
        """The content of ``profile/profile.json``; None before a profile."""
        return read_json(self.root / "profile" / "profile.json", made_by="the profile")

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The content of each evaluation's ``run.json``."""
        return [note for folder in self.evaluations if (note := folder.read())]

    def title(self, folder: RunFolder) -> str:
        """Name and model of one of the run folders, of an absolute path the last part."""
        settings = folder.settings() or {}
        fingerprint = self.rows[0].depends_on.get("model_fingerprint") if self.rows else None
        model = str(settings.get("model", {}).get("name") or str(fingerprint or "?")[:12])
        return f"{self.name}: {Path(model).name if Path(model).is_absolute() else model}"


def gather(root: Path) -> Records:
    """Read all records under a comparison's folder.

    Raises:
        ExperimentError: There is nothing to report.
    """
    records = _read(root, root.name, *_files([root]))
    if not (records.rows or records.profile or records.runs):
        raise ExperimentError(
            f"{root} has no records to report; run profile, train and evaluate with the same "
            "name=... (or experiment=...) first."
        )
    return records


def read_comparisons(folders: Sequence[Path]) -> list[Records]:
    """Read all records under some folders, at any depth; each file is read once.

    Raises:
        ExperimentError: A folder does not exist, or there are no records.
        ArtifactError: A record is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ExperimentError(f"There is no folder {folder}; runs= names folders to read.")
    evaluations, trainings = _files(folders)
    homes = sorted({_home(path.parent) for path in [*evaluations, *trainings]})
    if not homes:
        raise ExperimentError(
            f"There are no records under {', '.join(map(str, folders))}; run train or evaluate "
            "first, or name other folders with runs=."
        )
    return [_read(home, _name(home, folders), evaluations, trainings) for home in homes]


def _files(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of results, and ``run.json`` of trainings, each once."""
    results = {path.resolve() for root in folders for path in record_files(root, ResultRow.file)}
    runs = {path.resolve() for root in folders for path in root.rglob("train/*/run.json")}
    return sorted(results), sorted(runs)


def _read(home: Path, name: str, evaluations: Iterable[Path], trainings: Iterable[Path]) -> Records:
    """Read those of the files that belong to a comparison's folder."""
    own = [file for file in evaluations if _home(file.parent) == home.resolve()]
    runs = [TrainingRun(file.parent) for file in trainings if _home(file.parent) == home.resolve()]
    training_s = {run.label: run.facts.get("training_s") for run in runs}
    rows = []
    for row in (row for file in own for row in ResultRow.read(file)):
        known = training_s.get(row.depends_on.get("method", {}).get("run"))
        rows.append(replace(row, training_s=known if row.training_s is None else row.training_s))
    return Records(home, name, rows, [RunFolder(file.parent) for file in own], runs)


def _home(folder: Path) -> Path:
    """Return the comparison's folder of a stage folder or of a run folder within it."""
    for path in (folder, *folder.parents):
        if path.name in ("evaluate", "train"):
            return path.parent
    return folder


def _name(home: Path, roots: Sequence[Path]) -> str:
    """The path of a comparison below the searched folder."""
    root = next((r.resolve() for r in roots if home.is_relative_to(r.resolve())), None)
    return str(home.relative_to(root)) if root and home != root else home.name

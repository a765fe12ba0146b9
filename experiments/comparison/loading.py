"""Load the records of run folders: one comparison for a report, or groups of many.

Reports and comparisons are made from records only, without a model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.comparison.records import PARTS, ResultRow
from experiments.comparison.summaries import Comparison
from experiments.comparison.training_runs import TrainingRun, training_dirs
from experiments.study.errors import ExperimentError
from experiments.study.records import read_json, record_files
from experiments.study.run_folder import RunFolder


@dataclass(frozen=True)
class ReportData:
    """All records under one comparison's folder.

    Attributes:
        root: That folder.
        comparison: Result rows; None before an evaluation.
        profile: The content of ``profile/profile.json``; None before a profile.
        runs: Training runs.
        evaluations: The content of each evaluation's ``run.json``.
    """

    root: Path
    comparison: Comparison | None
    profile: dict[str, Any] | None
    runs: list[TrainingRun]
    evaluations: list[dict[str, Any]]


def gather(root: Path) -> ReportData:
    """Read all records under a comparison's folder.

    Raises:
        ExperimentError: There is nothing to report.
    """
    files = record_files(root / "evaluate", "results.jsonl")
    runs = [TrainingRun(path) for path in training_dirs(root)]
    rows = with_training_s([row for file in files for row in ResultRow.read(file)], runs)
    profile = read_json(root / "profile" / "profile.json", made_by="the profile")
    if not (rows or profile or runs):
        raise ExperimentError(
            f"{root} has no records to report; run profile, train and evaluate with the same "
            "name=... (or experiment=...) first."
        )
    notes = [note for file in files if (note := RunFolder(file.parent).read())]
    return ReportData(root, Comparison(rows) if rows else None, profile, runs, notes)


def with_training_s(rows: Sequence[ResultRow], runs: Sequence[TrainingRun]) -> list[ResultRow]:
    """Return the rows with missing seconds of training filled in from the training runs."""
    known = {run.label: run.facts.get("training_s") for run in runs}
    completed = []
    for row in rows:
        label = row.provenance.get("depends_on", {}).get("method", {}).get("run")
        seconds = row.training_s if row.training_s is not None else known.get(label)
        completed.append(replace(row, training_s=seconds))
    return completed


_STAGES = ("evaluate", "train")

_SEPARATE = {
    "model_fingerprint": "model",
    "dtype": "dtype",
    "repair": "stubs",
    "calibration_sha256": "calibration",
    "report_sha256": "report",
}
"""Dependencies in which rows of one group are equal, with their names in headings."""


@dataclass(frozen=True)
class Group:
    """Rows with equal comparison, model, repair, calibration text and report text.

    Only rows of one group may be averaged.

    Attributes:
        name: The comparison's folder, relative to the searched folder, and what distinguishes the
            group from others of the folder.
        model: The model's name.
        repair: Name of the stubs that replace removed blocks; ``none`` without stubs.
        rows: Result rows.
    """

    name: str
    model: str
    repair: str
    rows: list[ResultRow]

    @property
    def depends_on(self) -> dict[str, Any]:
        """Dependencies of the first row."""
        return dict(self.rows[0].provenance.get("depends_on", {}))

    @cached_property
    def parts(self) -> dict[str, Comparison]:
        """The rows by part of the evaluation, the grid first."""
        present = {row.part for row in self.rows}
        return {part: Comparison(self.rows, part) for part in PARTS if part in present}


@dataclass(frozen=True)
class Learning:
    """Training runs of one comparison with equal model and repair."""

    name: str
    model: str
    repair: str
    runs: list[TrainingRun]

    @cached_property
    def by_method(self) -> dict[str, list[TrainingRun]]:
        """The runs of each method, one for each seed."""
        by_method: dict[str, list[TrainingRun]] = defaultdict(list)
        for run in self.runs:
            by_method[run.method].append(run)
        return dict(by_method)


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[Learning]]:
    """Read all records under some folders, at any depth; each file is read once.

    Raises:
        ExperimentError: A folder does not exist, or there are no records.
        ArtifactError: A record is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ExperimentError(f"There is no folder {folder}; runs= names folders to read.")
    evaluations = _unique(path for root in folders for path in record_files(root, "results.jsonl"))
    trainings = _unique(path for root in folders for path in root.rglob("train/*/run.json"))
    if not (evaluations or trainings):
        raise ExperimentError(
            f"There are no records under {', '.join(map(str, folders))}; run train or evaluate "
            "first, or name other folders with runs=."
        )
    names = _names({_home(path.parent) for path in [*evaluations, *trainings]}, folders)
    learning = _learning(trainings, names)
    return _groups(evaluations, names, learning), learning


def _groups(
    files: Iterable[Path], names: dict[Path, str], learning: Sequence[Learning]
) -> list[Group]:
    groups: dict[tuple[str, ...], Group] = {}
    for file in files:
        name, folder = names[_home(file.parent)], RunFolder(file.parent)
        runs = [run for part in learning if part.name == name for run in part.runs]
        settings = folder.settings() or {}
        for row in with_training_s(ResultRow.read(file), runs):
            depends = row.provenance.get("depends_on", {})
            key = (name, *(str(depends.get(part)) for part in _SEPARATE))
            if key not in groups:
                model, repair = _model(settings, depends), _repair(settings, depends)
                groups[key] = Group(name, model, repair, [])
            groups[key].rows.append(row)
    return _distinct_names(list(groups.values()))


def _distinct_names(groups: list[Group]) -> list[Group]:
    """Add to the names of groups with equal name, model and repair what differs."""
    equal: dict[tuple[str, str, str], list[Group]] = defaultdict(list)
    for group in groups:
        equal[group.name, group.model, group.repair].append(group)
    return [
        replace(group, name=f"{group.name}{_differs(group, others)}")
        for others in equal.values()
        for group in others
    ]


def _differs(group: Group, others: Sequence[Group]) -> str:
    """Return the dependencies in which a group differs, in brackets; empty if none."""
    words = [
        f"{words} {str(group.depends_on.get(key))[:8]}"
        for key, words in _SEPARATE.items()
        if len({str(other.depends_on.get(key)) for other in others}) > 1
    ]
    return f" ({', '.join(words)})" if words else ""


def _learning(files: Iterable[Path], names: dict[Path, str]) -> list[Learning]:
    by_model: dict[tuple[str, str, str], Learning] = {}
    for file in files:
        run = TrainingRun(file.parent)
        settings = run.settings() or {}
        key = names[_home(file.parent)], _model(settings, {}), _setting(settings)
        by_model.setdefault(key, Learning(*key, [])).runs.append(run)
    return list(by_model.values())


def _home(folder: Path) -> Path:
    """Return the comparison's folder of a stage folder or of a run folder within it."""
    for path in (folder, *folder.parents):
        if path.name in _STAGES:
            return path.parent
    return folder


def _names(homes: Iterable[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """Name each comparison by its path below the searched folder."""
    named = {}
    for home in homes:
        root = next((r.resolve() for r in roots if home.is_relative_to(r.resolve())), None)
        named[home] = str(home.relative_to(root)) if root and home != root else home.name
    times = Counter(named.values())
    return {
        home: name if times[name] == 1 else f"{home.parent.name}/{home.name}"
        for home, name in named.items()
    }


def _unique(paths: Iterable[Path]) -> list[Path]:
    return sorted({path.resolve() for path in paths})


def _model(settings: dict[str, Any], depends: dict[str, Any]) -> str:
    """Return the model's name; of an absolute path, only the last part."""
    name = str(settings.get("model", {}).get("name") or depends.get("model_fingerprint", "?")[:12])
    return Path(name).name if Path(name).is_absolute() else name


def _repair(settings: dict[str, Any], depends: dict[str, Any]) -> str:
    if not depends.get("repair"):
        return "none"
    name = _setting(settings)
    return str(depends["repair"])[:12] if name == "none" else name


def _setting(settings: dict[str, Any]) -> str:
    return Path(str(settings.get("repair", {}).get("name", "none"))).stem

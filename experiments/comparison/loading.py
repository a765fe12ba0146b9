"""Reads a comparison's records. A report is made from these alone: no model, no scoring."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.comparison.records import PARTS, ResultRow, read_json, read_rows
from experiments.comparison.run_folder import RunFolder, TrainingRun, training_dirs, training_run
from experiments.comparison.summaries import Comparison
from experiments.errors import ExperimentError
from experiments.repair.records import ORDERS_FILE, RepairRow, read_orders
from experiments.repair.summaries import RepairComparison


@dataclass(frozen=True)
class ReportData:
    """All records under one comparison's folder.

    Attributes:
        root: That folder.
        comparison: Result rows, or None before an evaluation.
        profile: The content of ``profile/profile.json``, or None.
        runs: Training runs.
        evaluations: The content of each evaluation's ``run.json``.
        repair: Repair rows, or None before ``experiments.repair``.
        repair_orders: Its GSI orders, by repair; empty without.
        repair_notes: The content of its ``run.json``, with the model's name; empty without.
    """

    root: Path
    comparison: Comparison | None
    profile: dict[str, Any] | None
    runs: list[TrainingRun]
    evaluations: list[dict[str, Any]]
    repair: RepairComparison | None
    repair_orders: dict[str, Any]
    repair_notes: list[dict[str, Any]]


def gather(root: Path) -> ReportData:
    """Read everything under a comparison's folder.

    Raises:
        ExperimentError: There is nothing to report.
        ArtifactError: A record is damaged.
    """
    files = sorted((root / "evaluate").rglob("results.jsonl"))
    runs = [training_run(path) for path in training_dirs(root)]
    rows = with_training_s([row for file in files for row in read_rows(file)], runs)
    profile = read_json(root / "profile" / "profile.json", made_by="the profile")
    repair_rows = RepairRow.read(root / "repair" / "repair.jsonl")
    if not (rows or profile or runs or repair_rows):
        raise ExperimentError(
            f"{root} has no records to report; run profile, train and evaluate, or repair, with "
            "the same name=... (or experiment=...) first."
        )
    repair_notes = _repair_notes(root / "repair") if repair_rows else []
    dense = repair_notes[-1].get("dense_accuracies") if repair_notes else None
    notes = [note for file in files if (note := RunFolder(file.parent).read())]
    return ReportData(
        root,
        Comparison(rows) if rows else None,
        profile,
        runs,
        notes,
        RepairComparison(repair_rows, dense) if repair_rows else None,
        read_orders(root / "repair" / ORDERS_FILE) if repair_rows else {},
        repair_notes,
    )


def with_training_s(rows: Sequence[ResultRow], runs: Sequence[TrainingRun]) -> list[ResultRow]:
    """The rows, with the seconds of training that they lack taken from the runs themselves."""
    known = {run.label: run.facts.get("training_s") for run in runs}
    found = []
    for row in rows:
        label = row.provenance.get("depends_on", {}).get("method", {}).get("run")
        seconds = row.training_s if row.training_s is not None else known.get(label)
        found.append(replace(row, training_s=seconds))
    return found


def _repair_notes(path: Path) -> list[dict[str, Any]]:
    """What `experiments.repair` noted of its run; nothing where rows were copied alone."""
    folder = RunFolder(path)
    note, settings = folder.read(), folder.settings() or {}
    return [{**note, "model": settings.get("model", {}).get("name", "")}] if note else []


_STAGES = ("evaluate", "train")

_SEPARATE = {
    "model_fingerprint": "model",
    "dtype": "dtype",
    "repair": "stubs",
    "calibration_sha256": "calibration",
    "report_sha256": "report",
}
"""What rows must agree in to be averaged together, with a word for it."""


@dataclass(frozen=True)
class Group:
    """Rows of one comparison, model, repair, calibration text and report text.

    Attributes:
        name: The comparison's folder, relative to the one that was searched.
        model: The model's name.
        repair: What stood in the place of removed blocks; ``none`` without stubs.
        rows: Result rows.
    """

    name: str
    model: str
    repair: str
    rows: list[ResultRow]

    @property
    def depends_on(self) -> dict[str, Any]:
        """What all rows depend on."""
        return dict(self.rows[0].provenance.get("depends_on", {}))

    @cached_property
    def parts(self) -> dict[str, Comparison]:
        """The rows by part of the evaluation: the grid first, then cells beside it."""
        present = {row.part for row in self.rows}
        return {part: Comparison(self.rows, part) for part in PARTS if part in present}


@dataclass(frozen=True)
class Learning:
    """Training runs of one comparison that share model and repair."""

    name: str
    model: str
    repair: str
    runs: list[TrainingRun]

    @cached_property
    def by_method(self) -> dict[str, list[TrainingRun]]:
        """The runs of each method, one a seed."""
        found: dict[str, list[TrainingRun]] = defaultdict(list)
        for run in self.runs:
            found[run.method].append(run)
        return dict(found)


def read_groups(folders: Sequence[Path]) -> tuple[list[Group], list[Learning]]:
    """Everything under some folders, read at any depth, the same file once.

    Raises:
        ExperimentError: A folder does not exist, or none has records.
        ArtifactError: A record is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ExperimentError(f"There is no folder {folder}; runs= names folders to read.")
    evaluations = _unique(path for root in folders for path in root.rglob("results.jsonl"))
    trainings = _unique(path for root in folders for path in root.rglob("train/*/run.json"))
    if not (evaluations or trainings):
        raise ExperimentError(
            f"No records lie under {', '.join(map(str, folders))}; run train or evaluate first, "
            "or name other folders with runs=."
        )
    names = _names({_home(path.parent) for path in [*evaluations, *trainings]}, folders)
    learning = _learning(trainings, names)
    return _groups(evaluations, names, learning), learning


def _groups(
    files: Iterable[Path], names: dict[Path, str], learning: Sequence[Learning]
) -> list[Group]:
    found: dict[tuple[str, ...], Group] = {}
    for file in files:
        name, folder = names[_home(file.parent)], RunFolder(file.parent)
        runs = [run for part in learning if part.name == name for run in part.runs]
        settings = folder.settings() or {}
        for row in with_training_s(read_rows(file), runs):
            depends = row.provenance.get("depends_on", {})
            key = (name, *(str(depends.get(part)) for part in _SEPARATE))
            if key not in found:
                found[key] = Group(name, _model(settings, depends), _repair(settings, depends), [])
            found[key].rows.append(row)
    return _told_apart(list(found.values()))


def _told_apart(groups: list[Group]) -> list[Group]:
    """Where groups share name, model and repair, their names are made to say what differs."""
    alike: dict[tuple[str, str, str], list[Group]] = defaultdict(list)
    for group in groups:
        alike[group.name, group.model, group.repair].append(group)
    return [
        replace(group, name=f"{group.name}{_differs(group, others)}")
        for others in alike.values()
        for group in others
    ]


def _differs(group: Group, others: Sequence[Group]) -> str:
    """What a group depends on that others do not, in brackets; empty if nothing."""
    words = [
        f"{words} {str(group.depends_on.get(key))[:8]}"
        for key, words in _SEPARATE.items()
        if len({str(other.depends_on.get(key)) for other in others}) > 1
    ]
    return f" ({', '.join(words)})" if words else ""


def _learning(files: Iterable[Path], names: dict[Path, str]) -> list[Learning]:
    found: dict[tuple[str, str, str], Learning] = {}
    for file in files:
        run = training_run(file.parent)
        key = names[_home(file.parent)], _model(run.settings, {}), _setting(run.settings)
        found.setdefault(key, Learning(*key, [])).runs.append(run)
    return list(found.values())


def _home(folder: Path) -> Path:
    """The comparison's folder that a stage's folder, or a run within it, belongs to."""
    for path in (folder, *folder.parents):
        if path.name in _STAGES:
            return path.parent
    return folder


def _names(homes: Iterable[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """What each comparison's folder is called: its place below the folder that was searched."""
    found = {}
    for home in homes:
        root = next((r.resolve() for r in roots if home.is_relative_to(r.resolve())), None)
        found[home] = str(home.relative_to(root)) if root and home != root else home.name
    times = Counter(found.values())
    return {
        home: name if times[name] == 1 else f"{home.parent.name}/{home.name}"
        for home, name in found.items()
    }


def _unique(paths: Iterable[Path]) -> list[Path]:
    return sorted({path.resolve() for path in paths})


def _model(settings: dict[str, Any], depends: dict[str, Any]) -> str:
    """A model's name for people: of a folder, its last part."""
    name = str(settings.get("model", {}).get("name") or depends.get("model_fingerprint", "?")[:12])
    return Path(name).name if Path(name).is_absolute() else name


def _repair(settings: dict[str, Any], depends: dict[str, Any]) -> str:
    if not depends.get("repair"):
        return "none"
    name = _setting(settings)
    return str(depends["repair"])[:12] if name == "none" else name


def _setting(settings: dict[str, Any]) -> str:
    return Path(str(settings.get("repair", {}).get("name", "none"))).stem

"""Records of any set of run folders, in groups whose losses may be averaged together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.comparison.records import PARTS, ResultRow, read_rows
from experiments.comparison.report_data import TrainingRun, training_run, with_training_s
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.summaries import Comparison
from experiments.errors import ExperimentError

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

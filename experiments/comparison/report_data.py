"""Reads a comparison's records. A report is made from these alone: no model, no scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.comparison.records import ResultRow, read_json, read_records, read_rows
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.summaries import Comparison
from experiments.errors import ExperimentError
from experiments.repair.orders import FILE as ORDERS
from experiments.repair.orders import read_orders
from experiments.repair.rows import RepairRow
from experiments.repair.summaries import RepairComparison


@dataclass(frozen=True)
class TrainingRun:
    """What one training left.

    Attributes:
        label: Folder name, such as ``maskable_ppo-s0``.
        method: The label without its seed.
        seed: The run's seed.
        curve: Metrics in order of step.
        facts: The content of ``run.json``.
        settings: The content of ``config.yaml``.
    """

    label: str
    method: str
    seed: int
    curve: list[dict[str, Any]]
    facts: dict[str, Any]
    settings: dict[str, Any]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged."""
        points = [(r["step"], r[name]) for r in self.curve if r.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


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
        read_orders(root / "repair" / ORDERS) if repair_rows else {},
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


def training_dirs(root: Path, *, finished: bool = False) -> list[Path]:
    """Folders of training runs under a comparison's folder, sorted by name.

    Args:
        root: The comparison's folder.
        finished: Leave out runs that have not come to their end.
    """
    found = sorted(path.parent for path in (root / "train").glob("*/run.json"))
    if not finished:
        return found
    return [path for path in found if "finished" in (RunFolder(path).read() or {})]


def method_and_seed(path: Path) -> tuple[str, int]:
    """Method and seed of a training run's folder, as its ``run.json`` says.

    Raises:
        ExperimentError: The folder holds no training run.
    """
    facts = RunFolder(path).read()
    if not facts or "method" not in facts:
        raise ExperimentError(
            f"{path} holds no training run; give a folder that experiments.train made."
        )
    return str(facts["method"]), int(facts["seed"])


def training_run(path: Path) -> TrainingRun:
    """What a training left in its folder.

    Raises:
        ExperimentError: The folder holds no training run.
        ArtifactError: A record is damaged.
    """
    folder = RunFolder(path)
    facts = folder.read() or {}
    method, seed = method_and_seed(path)
    return TrainingRun(
        path.name, method, seed, read_records(folder.metrics), facts, folder.settings() or {}
    )


def _repair_notes(path: Path) -> list[dict[str, Any]]:
    """What `experiments.repair` noted of its run; nothing where rows were copied alone."""
    folder = RunFolder(path)
    note, settings = folder.read(), folder.settings() or {}
    return [{**note, "model": settings.get("model", {}).get("name", "")}] if note else []

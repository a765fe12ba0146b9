"""Folders of training runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.study.errors import ExperimentError
from experiments.study.records import read_records
from experiments.study.run_folder import RunFolder

TABLE_FILE = "score_table.json"
"""Name of the score table that a training used, in its run folder."""


@dataclass(frozen=True)
class TrainingRun(RunFolder):
    """Folder of one training run."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            ExperimentError: The folder holds no training run.
        """
        facts = self.read()
        if not facts or "method" not in facts:
            raise ExperimentError(
                f"{self.path} holds no training run; name a folder that experiments.train wrote."
            )
        return facts

    @property
    def label(self) -> str:
        """Folder name, such as ``maskable_ppo-s0``."""
        return self.path.name

    @property
    def method(self) -> str:
        """The label without its seed."""
        return str(self.facts["method"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.facts["seed"])

    @property
    def swept(self) -> dict[str, Any]:
        """What varies in the run's sweep, with its values; empty outside a sweep."""
        return dict(self.facts.get("swept") or {})

    @property
    def objective(self) -> float | None:
        """Mean ΔNLL of the policy on the evaluation's grid, nats per token; None if unfinished."""
        objective = self.facts.get("objective")
        return None if objective is None else float(objective)

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """Metrics in order of step."""
        return read_records(self.metrics)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one metric, where it was logged."""
        points = [(r["step"], r[name]) for r in self.curve if r.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


def training_dirs(root: Path, *, finished: bool = False) -> list[Path]:
    """Return the folders of a comparison's training runs, sorted by name.

    Args:
        root: The comparison's folder.
        finished: Whether to skip unfinished runs.
    """
    folders = sorted(path.parent for path in (root / "train").glob("*/run.json"))
    if not finished:
        return folders
    return [path for path in folders if "finished" in (RunFolder(path).read() or {})]

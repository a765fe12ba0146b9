"""Folders of training runs, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import read_records
from experiments.study.looks import short_label
from experiments.study.run_folder import RunFolder, short_keys
from experiments.study.statistics import mean_of_known
from experiments.study.table_format import Table, columns_table, seconds

TABLE_FILE = "score_table.json"
"""Name of the score table that a training used, in its run folder."""

LAST_EPISODES = 50
"""Number of last training episodes that the final ΔNLL averages."""

LEARNING_CAPTION = (
    f"Final ΔNLL: mean over the last {LAST_EPISODES} training episodes (sampled actions, "
    "calibration text, nats per token) and seeds, with the lowest and the highest seed. Objective: "
    "mean ΔNLL of the policy's choices on the evaluation's grid, which a search minimises."
)


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
        """What varies in the run's sweep other than the seed, with its values."""
        return {key: v for key, v in (self.facts.get("swept") or {}).items() if key != "seed"}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one metric, where it was logged."""
        points = [(r["step"], r[name]) for r in self._curve if r.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    @cached_property
    def _curve(self) -> list[dict[str, Any]]:
        return read_records(self.metrics)

    @property
    def final_delta_nll(self) -> float | None:
        """Mean ΔNLL of the last episodes, nats per token; None if not logged."""
        _, losses = self.series("episode/delta_nll")
        if losses:
            return float(np.mean(losses[-LAST_EPISODES:]))
        recent = self.facts.get("recent_delta_nll")
        return None if recent is None else float(recent)


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


def learning_table(runs: Sequence[TrainingRun]) -> Table:
    """Return objective, final ΔNLL and cost of the training runs of each method, over seeds."""

    def count(runs: Sequence[TrainingRun], key: str) -> str:
        mean = mean_of_known(run.facts.get(key) for run in runs)
        return "-" if mean is None else f"{mean:,.0f}"

    def training(runs: Sequence[TrainingRun]) -> str:
        mean = mean_of_known(run.facts.get("training_s") for run in runs)
        unfinished = sum("finished" not in run.facts for run in runs)
        shown = "-" if mean is None else seconds(mean)
        return f"{shown} ({unfinished} unfinished)" if unfinished else shown

    def final(runs: Sequence[TrainingRun]) -> str:
        losses = [loss for run in runs if (loss := run.final_delta_nll) is not None]
        return f"{np.mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]" if losses else "-"

    columns: dict[str, Callable[[list[TrainingRun]], str]] = {
        "Trained": lambda runs: short_label(runs[0].method),
        "Seeds": lambda runs: str(len(runs)),
        "Steps": lambda runs: count(runs, "timesteps"),
        "Evaluations": lambda runs: count(runs, "evaluations"),
        "Training": training,
        "Final ΔNLL": final,
        "Objective": _objective,
    }
    return columns_table(by_objective(runs), columns)


def swept_table(runs: Sequence[TrainingRun]) -> Table | None:
    """Return the objective and the whole values of what varies between methods, best first.

    Returns:
        None if nothing but agent and seed varies.
    """
    methods = by_objective(runs)
    keys = dict.fromkeys(key for runs in methods for key in runs[0].swept)
    keys.pop("agent", None)  # the runs are named by it
    if not keys:
        return None
    short, rows = short_keys(keys), []
    for runs in methods:
        agent = (runs[0].settings() or {}).get("agent", {})
        label = short_label(agent.get("label") or agent.get("name") or runs[0].method)
        values = [str(runs[0].swept.get(key, "-")) for key in keys]
        rows.append([*values, label, _objective(runs)])
    return [*[short[key] for key in keys], "Trained", "Objective"], rows


def by_objective(runs: Iterable[TrainingRun]) -> list[list[TrainingRun]]:
    """Return the runs of each method; of a sweep, those with the best objective first."""
    by_method: dict[str, list[TrainingRun]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    methods = list(by_method.values())
    if not any(runs[0].swept for runs in methods):
        return methods
    return sorted(methods, key=lambda runs: ((mean := _mean_objective(runs)) is None, mean))


def _objective(runs: Sequence[TrainingRun]) -> str:
    mean = _mean_objective(runs)
    return "-" if mean is None else f"{mean:.4f}"


def _mean_objective(runs: Sequence[TrainingRun]) -> float | None:
    return mean_of_known(run.facts.get("objective") for run in runs)

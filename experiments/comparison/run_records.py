"""The records of run folders: of one comparison for a report, or of many; tables of trainings.

Reports and comparisons are made from records only, without a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.comparison.result_rows import ResultRow
from experiments.comparison.summaries import Comparison, check_equal
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records, record_files
from experiments.study.plotting import short_label
from experiments.study.run_folder import RunFolder
from experiments.study.statistics import mean_of_known
from experiments.study.table_format import columns_table, seconds

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
    def comparison(self) -> Comparison | None:
        """The rows; None before an evaluation.

        Raises:
            ArtifactError: They are of different models or texts, which must not be averaged.
        """
        check_equal(self.rows, _EQUAL)
        return Comparison(self.rows) if self.rows else None

    def title(self, folder: RunFolder) -> str:
        """Name and model of one of the run folders, of an absolute path the last part."""
        settings = folder.settings() or {}
        fingerprint = self.rows[0].depends_on.get("model_fingerprint") if self.rows else None
        model = str(settings.get("model", {}).get("name") or str(fingerprint or "?")[:12])
        return f"{self.name}: {Path(model).name if Path(model).is_absolute() else model}"


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


TABLE_FILE = "score_table.json"
"""Name of the score table that a training used, in its run folder."""

LAST_EPISODES = 50
"""Number of last training episodes that the final ΔNLL averages."""

LEARNING_CAPTION = (
    f"Final ΔNLL: mean over the last {LAST_EPISODES} training episodes (sampled actions, "
    "calibration text, nats per token) and seeds, with the lowest and the highest seed. Objective: "
    "what the policy's choices on the evaluation's grid count as, mean in nats per token, which a "
    "search minimises."
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


def finished_trainings(root: Path) -> list[Path]:
    """Return the folders of a comparison's finished training runs, sorted by name."""
    folders = sorted(path.parent for path in (root / "train").glob("*/run.json"))
    return [path for path in folders if "finished" in (RunFolder(path).read() or {})]


def learning_table(runs: Sequence[TrainingRun]) -> pd.DataFrame:
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


def swept_table(runs: Sequence[TrainingRun]) -> pd.DataFrame | None:
    """Return the objective and the whole values of what varies between methods, best first.

    Returns:
        None if nothing but agent and seed varies.
    """
    methods = by_objective(runs)
    keys = dict.fromkeys(key for runs in methods for key in runs[0].swept)
    keys.pop("agent", None)  # the runs are named by it
    if not keys:
        return None
    rows = []
    for runs in methods:
        agent = (runs[0].settings() or {}).get("agent", {})
        label = short_label(agent.get("label") or agent.get("name") or runs[0].method)
        values = [str(runs[0].swept.get(key, "-")) for key in keys]
        rows.append([*values, label, _objective(runs)])
    header = [*(key.rpartition(".")[2] for key in keys), "Trained", "Objective"]
    return pd.DataFrame(rows, columns=header)


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

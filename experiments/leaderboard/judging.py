"""Evaluate the trained policies of a sweep on a pinned task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rap_env
from agents.trained_policy import TrainedPolicy
from experiments.comparison.training_runs import TrainingRun, training_dirs
from experiments.errors import ExperimentError
from experiments.study.records import write_records
from rap_env.leaderboard.evaluation import Evaluation
from rap_env.leaderboard.tasks import pinned_task


def judge_runs(task: str, root: Path, split: str) -> Iterator[tuple[TrainingRun, Evaluation]]:
    """Evaluate the finished training runs below ``root/train`` on a pinned task.

    All rows replace ``root/evaluate/TASK-SPLIT/results.jsonl`` at the end.

    Args:
        task: Name of a pinned task on a score table.
        root: The folder of a comparison, such as ``runs/NAME``.
        split: ``"calibration"`` or ``"test"``.

    Yields:
        Each run and its result.

    Raises:
        ExperimentError: There are no finished runs.
        RapError: A policy cannot be loaded, or it does not fit the task.
    """
    folders = training_dirs(root, finished=True)
    if not folders:
        raise ExperimentError(
            f"{root} has no finished training runs; give the folder of a comparison that "
            "experiments.train wrote, such as runs/NAME."
        )
    env: Any = pinned_task(task).make().unwrapped
    rows = []
    for run in map(TrainingRun, folders):
        policy = TrainedPolicy.load(run.path, env.context)
        result = rap_env.evaluate(policy, task, split, name=run.method, seed=run.seed)
        yield run, result
        rows += [_of_run(row, run) for row in result.rows()]
    env.close()
    name = f"{task.rpartition('/')[2]}-{split}"
    write_records(root / "evaluate" / name / "results.jsonl", rows)


def _of_run(row: dict[str, Any], run: TrainingRun) -> dict[str, Any]:
    """The row with the run and its seed."""
    depends_on = {**row["provenance"]["depends_on"], "method": {"run": run.label}}
    return {
        **row,
        "seed": run.seed,
        "training_s": run.facts.get("training_s"),
        "provenance": {**row["provenance"], "depends_on": depends_on},
    }

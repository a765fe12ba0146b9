"""Entries of the leaderboard: the plans of a method at the requests of a pinned comparison.

An entry is one file. It holds plans rather than numbers alone, so that anyone can replay them
on the model (`experiments.leaderboard`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.leaderboard.tasks import SPLITS, Floats, tasks_of
from rap_env.plan import Plan
from rap_env.scoring.held_out import HeldOutLosses

ENTRIES = Path(__file__).parent / "published"
"""Folder of the published entries, ``COMPARISON/NAME.json`` each."""

_KIND, _FORMAT = "leaderboard entry", 1


@dataclass(frozen=True)
class Run:
    """The plans of one training seed, or of a method without one.

    Attributes:
        seed: Training seed; None without one.
        plans: For each request, the levels of all lowered items by name.
        delta_nll: For each split that was measured, ΔNLL of each plan, nats per token.
        fits: For each request, whether the plan is within the budget.
    """

    seed: int | None
    plans: tuple[dict[str, str], ...]
    delta_nll: dict[str, tuple[float, ...]]
    fits: tuple[bool, ...]


@dataclass(frozen=True)
class Entry:
    """A method on one comparison.

    Attributes:
        name: Its name in tables.
        comparison: The comparison, as in `PinnedTask`.
        description: One sentence: what the method is.
        runs: A run for each training seed.
        evaluations: Plans that the model scored for each request, median over requests.
        setup_evaluations: Plans that the model scored once, before any request.
        decision_s: Seconds for each request, median.
        origin: Who made it, with which command and from which records.
    """

    name: str
    comparison: str
    description: str
    runs: tuple[Run, ...]
    evaluations: float = 0.0
    setup_evaluations: int = 0
    decision_s: float = 0.0
    origin: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Hash of all plans: entries with equal plans are equal, whatever their names."""
        return digest([list(run.plans) for run in self.runs])

    def measured_on(self, split: str) -> bool:
        """Whether all plans were measured on the text of a split."""
        return all(split in run.delta_nll for run in self.runs)

    def scores(self, split: str) -> Floats:
        """What its plans count as at each request, mean over seeds, nats per token, (requests,).

        `PinnedTask.scores` has the rule.
        """
        task = tasks_of(self.comparison)[0]
        runs = [task.scores(run.delta_nll[split], run.fits) for run in self.runs]
        return np.asarray(np.mean(runs, axis=0))

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> Path:
        """Write it as a checked JSON artifact, as gzip with `compress`; return the path."""
        save_artifact(path, _KIND, _FORMAT, asdict(self), compress=compress)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or no entry; or a run is incomplete.
        """
        body = load_artifact(path, _KIND, _FORMAT)
        runs = tuple(
            Run(
                seed=run["seed"],
                plans=tuple(run["plans"]),
                delta_nll={split: tuple(values) for split, values in run["delta_nll"].items()},
                fits=tuple(run["fits"]),
            )
            for run in body.pop("runs")
        )
        for run in runs:
            counts = {len(run.plans), len(run.fits), *map(len, run.delta_nll.values())}
            if len(counts) != 1 or not set(run.delta_nll) <= set(SPLITS):
                raise ArtifactError(
                    f"{os.fspath(path)} has a run (seed {run.seed}) whose plans and losses do not "
                    "match; write it with Evaluation.entry(...).save(path)."
                )
            for plan in run.plans:
                Plan.of(plan)  # unknown items and levels are found here
        return cls(runs=runs, **body)


UNCHOSEN = ("dense", "lowest")
"""Published plans that no method chose, by the names of records: native, and all levels
lowest."""


def published_entries(comparison: str) -> Sequence[Entry]:
    """The published entries of a comparison."""
    return [Entry.load(path) for path in sorted((ENTRIES / comparison).glob("*.json"))]


def predicted_test_delta_nll(comparison: str) -> dict[str, float]:
    """Return what the table of a comparison predicts for each published method on held-out text.

    The prediction for a method is fitted without its plans, as if the method were new.

    Args:
        comparison: Name of a pinned comparison.

    Returns:
        Mean predicted ΔNLL by the name of the method, nats per token.

    Raises:
        ArtifactError: Too few plans were measured on held-out text without one of the
            methods.
    """
    task = next(task for task in tasks_of(comparison) if not task.live)
    env: Any = task.make()
    context = env.unwrapped.context
    measured: HeldOutLosses = context.table.held_out
    dense_nll = context.scorer.dense_nll
    calibration = {plan: context.scorer.nll(plan) - dense_nll for plan in measured.measured}
    by_method = {}
    for entry in published_entries(comparison):
        if entry.origin["method"] in UNCHOSEN:
            continue
        plans = [Plan.of(plan) for run in entry.runs for plan in run.plans]
        values = itertools.chain(*(run.delta_nll["calibration"] for run in entry.runs))
        fits = [*itertools.chain(*(run.fits for run in entry.runs))]
        own = set(plans)
        others = {plan: value for plan, value in measured.measured.items() if plan not in own}
        losses = HeldOutLosses.fitted(measured.text, others, calibration, measured.num_blocks)
        predicted = [*map(losses.delta_nll, plans, values)]
        by_method[entry.name] = float(task.scores(predicted, fits).mean())
    return by_method

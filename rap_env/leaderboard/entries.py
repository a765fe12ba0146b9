"""Entries of the leaderboard: the plans of a method at the requests of a pinned comparison.

An entry is one file. It holds plans rather than numbers alone, so that anyone can replay them
on the model (`experiments.leaderboard`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.ladder.items import Ladder
from rap_env.leaderboard.tasks import SPLITS, Floats, tasks_of
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.held_out import HeldOutLosses

ENTRIES = Path(__file__).parent / "published"
"""Folder of the published entries, ``COMPARISON/NAME.json.gz`` each."""

_KIND, _FORMAT = "leaderboard entry", 1


@dataclass(frozen=True)
class Run:
    """The plans of one training seed, or of a method without one.

    Attributes:
        seed: Training seed; None without one.
        plans: For each request, the levels of all lowered items by name.
        delta_nll: For each split on whose text the model ran all plans that fit, ΔNLL of each
            plan, nats per token.
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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as a checked JSON artifact, as gzip if its name ends so; return the path."""
        path = Path(path)
        save_artifact(path, _KIND, _FORMAT, asdict(self), compress=path.suffix == ".gz")
        return path

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
    return [Entry.load(path) for path in sorted((ENTRIES / comparison).glob("*.json.gz"))]


@dataclass(frozen=True)
class TableValues:
    """What the table of a comparison says of a published method without running the model.

    Attributes:
        calibration: Mean ΔNLL on the calibration text, nats per token.
        test: Mean ΔNLL on the test text, predicted without the method's own plans, as if the
            method were new, nats per token.
        num_predicted: Plans, of all seeds, that fit and that the table has not measured on
            the calibration text.
    """

    calibration: float
    test: float
    num_predicted: int


def table_values(comparison: str) -> dict[str, TableValues]:
    """What the table of a comparison says of each published method that chooses, by its name.

    Without a table, in a comparison whose tasks all run the model, it says nothing.

    Args:
        comparison: Name of a pinned comparison.

    Raises:
        ArtifactError: Too few plans were measured on held-out text without one of the
            methods.
    """
    task = next((task for task in tasks_of(comparison) if not task.live), None)
    if task is None:
        return {}  # the model runs for every plan
    env: Any = task.make()
    scorer = env.unwrapped.context.scorer
    held_out: HeldOutLosses = env.unwrapped.context.table.held_out
    calibration = {plan: scorer.nll(plan) - scorer.native_nll for plan in held_out.measured}
    values = {}
    for entry in published_entries(comparison):
        if entry.origin["method"] in UNCHOSEN:
            continue
        plans = [Plan.of(plan) for run in entry.runs for plan in run.plans]
        own = {*plans}
        fits = [*itertools.chain(*(run.fits for run in entry.runs))]
        others = {plan: value for plan, value in held_out.measured.items() if plan not in own}
        losses = HeldOutLosses.fitted(held_out.text, others, calibration, held_out.num_blocks)
        on_calibration = [scorer.nll(plan) - scorer.native_nll for plan in plans]
        on_test = [*map(losses.delta_nll, plans, on_calibration)]
        values[entry.name] = TableValues(
            calibration=float(task.scores(on_calibration, fits).mean()),
            test=float(task.scores(on_test, fits).mean()),
            num_predicted=sum(map(scorer.is_predicted, itertools.compress(plans, fits))),
        )
    return values


def nested_shares(comparison: str) -> dict[str, float]:
    """`nested_share` of each published method that chooses, mean over seeds, by its name."""
    task = min(tasks_of(comparison), key=lambda task: task.live)
    env: Any = task.make()
    values = {}
    for entry in published_entries(comparison):
        if entry.origin["method"] not in UNCHOSEN:
            by_run = [[*map(Plan.of, run.plans)] for run in entry.runs]
            shares = [nested_share(task.requests, plans, env.unwrapped.ladder) for plans in by_run]
            values[entry.name] = float(np.mean(shares))
    return values


def nested_share(requests: Sequence[Request], plans: Sequence[Plan], ladder: Ladder) -> float:
    """Share of pairs of budgets for one shape whose plans are nested.

    They are if the plan for the smaller budget has no item at a higher level than the plan
    for the larger one.

    Args:
        requests: The requests, some of which differ in their budget alone.
        plans: The plan for each request.
        ladder: The items and the order of their levels.
    """
    pairs = []
    chosen = [*zip(requests, map(ladder.positions, plans), strict=True)]
    for (first, above), (second, below) in itertools.permutations(chosen, 2):
        same_shape = replace(first, budget_bytes=second.budget_bytes) == second
        if same_shape and first.budget_bytes > second.budget_bytes:
            pairs.append(bool(np.all(np.array(above) <= np.array(below))))
    return float(np.mean(pairs))

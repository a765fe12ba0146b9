"""``python -m experiments.leaderboard``: check or publish entries.

``check FILE`` replays the plans of an entry on the real model, and refuses numbers that do
not reproduce. ``publish TASK METHOD...`` writes the entries of methods, such as the controls
in ``examples/``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rap_env
from experiments.study.console import fail, say
from experiments.study.plotting import look
from rap_env.errors import RapError
from rap_env.leaderboard.entries import ENTRIES, Entry
from rap_env.leaderboard.measuring import TaskLosses
from rap_env.leaderboard.tasks import SPLITS, tasks_of
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.plugins import find_plugin
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.scoring.scorer import PlanScorer

TOLERANCE_NLL, TOLERANCE_SHARE = 0.01, 0.02
"""Nats per token, and share of ΔNLL: other processors round bfloat16 differently."""


def check_entry(
    entry: Entry,
    memory: MemoryModel,
    requests: Sequence[Request],
    scorers: Mapping[str, PlanScorer],
    *,
    every: int = 1,
    on_plan: Callable[[], object] = lambda: None,
) -> list[str]:
    """Replay the plans of an entry.

    Args:
        entry: The entry.
        memory: Byte arithmetic of the model.
        requests: The requests of its comparison.
        scorers: A scorer of the real model for each split to check.
        every: Replay each n-th request only.
        on_plan: Called after each plan.

    Returns:
        What does not reproduce, one sentence each.
    """
    wrong = []
    for run in entry.runs:
        if len(run.plans) != len(requests):
            return [f"It has {len(run.plans)} plans for {len(requests)} requests."]
        for number in range(0, len(requests), every):
            request, plan = requests[number], Plan.of(run.plans[number])
            where = f"Seed {run.seed}, request {number} ({request})"
            peak_bytes = memory.peak_bytes(plan, request)
            if (peak_bytes <= request.budget_bytes) != run.fits[number]:
                wrong.append(
                    f"{where}: the plan needs {peak_bytes:,} bytes, so fits={run.fits[number]} "
                    "is wrong."
                )
            if not run.fits[number]:
                continue
            for split, scorer in scorers.items():
                if split not in run.delta_nll:
                    continue
                stated = run.delta_nll[split][number]
                actual = scorer.nll(plan) - scorer.native_nll
                if not math.isclose(stated, actual, rel_tol=TOLERANCE_SHARE, abs_tol=TOLERANCE_NLL):
                    wrong.append(f"{where}, {split}: ΔNLL {stated:.4f} stated, {actual:.4f} found.")
            on_plan()
    return wrong


def check_file(file: Path, every: int, threads: int) -> list[str]:
    """Replay the plans of an entry's file on the real model.

    Args:
        file: The entry.
        every: Check each n-th request only.
        threads: Threads of torch.

    Returns:
        What does not reproduce, one sentence each.

    Raises:
        RapError: The file is no entry, or the model or a text cannot be loaded.
    """
    import torch

    from rap_env.models.progress import progress_bar

    torch.set_num_threads(threads)
    entry = Entry.load(file)
    task = tasks_of(entry.comparison)[0]
    env: Any = task.make().unwrapped
    losses = TaskLosses(task, env.context)
    scorers = {split: losses.scorer(split) for split in SPLITS if entry.measured_on(split)}
    total = len(entry.runs) * len(range(0, len(task.requests), every))
    with progress_bar(True, total=total, desc="replay", unit="plan") as bar:
        return check_entry(
            entry, env.memory, task.requests, scorers, every=every, on_plan=bar.update
        )


def publish_method(task: str, method: str, measure: bool) -> Path:
    """Write the entry of a method into the package.

    Args:
        task: Name of a pinned task.
        method: Its class as ``package.module:Class``. The first line of its docstring
            describes it.
        measure: Whether to run the model for plans that the table has not measured. Without,
            the entry is not ranked.

    Returns:
        The entry's file.

    Raises:
        RapError: As finding the class and evaluating it do.
    """
    found = find_plugin("policy", method, [], "Give package.module:Class.").load()
    label = look(found.name).label
    name = found.name.replace("_", " ").capitalize() if label == found.name else label
    result: Any = rap_env.evaluate(found, task, "test", name=name, measure=measure)
    say(str(result))
    description = (inspect.getdoc(found) or name).partition("\n")[0].rstrip(".")
    entry = result.entry(description, method=found.name, source=method)
    saved: Path = entry.save(ENTRIES / result.task.comparison / f"{found.name}.json.gz")
    return saved


@click.group()
def main() -> None:
    """Check and write entries of the leaderboard."""


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--every", default=1, show_default=True, help="Check each n-th request only.")
@click.option("--threads", default=1, show_default=True)
def check(file: Path, every: int, threads: int) -> None:
    """Replay the plans of FILE on the real model, and refuse what does not reproduce."""
    try:
        wrong = check_file(file, every, threads)
    except RapError as error:
        fail(str(error))
    for line in wrong:
        say(line)
    if wrong:
        fail(f"{file} does not reproduce: {len(wrong)} differences.")
    say(f"{file} reproduces.")


@main.command()
@click.argument("task")
@click.argument("methods", nargs=-1, required=True)
@click.option(
    "--measure", is_flag=True, help="Run the model for plans that the table has not measured."
)
def publish(task: str, methods: tuple[str, ...], measure: bool) -> None:
    """Write the entries of METHODS (package.module:Class) on the pinned TASK into the package."""
    try:
        for method in methods:
            say(f"Wrote {publish_method(task, method, measure)}.")
    except RapError as error:
        fail(str(error))


if __name__ == "__main__":
    main()

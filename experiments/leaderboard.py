"""``python -m experiments.leaderboard``: check entries of the leaderboard, or publish our own.

``check FILE`` replays the plans of an entry on the real model and on held-out text, and refuses
numbers that do not reproduce. ``publish`` makes the pinned tasks and the entries of our methods
from the records in ``results/``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gymnasium
import numpy as np

from experiments.comparison.formatting import look
from experiments.comparison.records import ResultRow, read_rows
from experiments.console import fail, say
from experiments.errors import ExperimentError
from rap_env.artifacts import atomic_write
from rap_env.errors import RapError
from rap_env.leaderboard.entries import ENTRIES, Entry, Run
from rap_env.leaderboard.tasks import PinnedTask, pinned_tasks
from rap_env.plan import CompressionPlan, simplest
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer

TOLERANCE_NLL, TOLERANCE_SHARE = 0.01, 0.02
"""Nats per token, and share of ΔNLL: other processors round bfloat16 differently."""

TASKS_FILE = ENTRIES.parent / "tasks.json"
LEFT_OUT = ("dense",)
"""Methods whose plans exceed the budgets."""


@dataclass(frozen=True)
class Comparison:
    """What `publish` makes a pinned comparison from.

    Attributes:
        name: Its name.
        environment: The environment.
        records: Folder of the records.
        arguments: Arguments of the environment in all tasks.
        tasks: Further arguments by the name of the task; the first task has the score table.
    """

    name: str
    environment: str
    records: str
    arguments: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


TABLE = {"model": "score_table:smollm2-135m"}
COMPARISONS = (
    Comparison(
        "SmolLM2-v0",
        "RAPPrune-v0",
        "learning",
        {
            "workload": {
                "name": "azure-conv",
                "max_batch_size": 16,
                "budget_fraction_range": [0.55, 0.95],
            },
            "reward": "perplexity",
        },
        {"RAPPrune/SmolLM2-Table-v0": TABLE},
    ),
    Comparison(
        "SmolLM2-v1",
        "RAPPrune-v1",
        "tight",
        {"workload": {"name": "tight"}, "reward": "perplexity"},
        {
            "RAPPrune/SmolLM2-Table-v1": TABLE,
            "RAPPrune/SmolLM2-v1": {"model": "smollm2-135m@pypi", "dtype": "bfloat16"},
        },
    ),
)

_THRESHOLD_REQUESTS = 1000


def make_entries(comparison: Comparison, rows: Sequence[ResultRow]) -> list[Entry]:
    """Return an entry for each method, with the plans of all its seeds."""
    requests = requests_of(rows)
    methods = dict.fromkeys(row.method for row in rows if row.method not in LEFT_OUT)
    return [_entry(comparison, method, rows, requests) for method in methods]


def requests_of(rows: Sequence[ResultRow]) -> list[Request]:
    """Return the requests of some rows, in their order."""
    return list(dict.fromkeys(Request(*row.shape, row.budget_bytes) for row in rows))


def _entry(
    comparison: Comparison, method: str, rows: Sequence[ResultRow], requests: Sequence[Request]
) -> Entry:
    own = [row for row in rows if row.method == method]
    runs = []
    for seed in dict.fromkeys(row.seed for row in own):
        at = {Request(*row.shape, row.budget_bytes): row for row in own if row.seed == seed}
        chosen = [at[request] for request in requests]
        runs.append(
            Run(
                seed,
                tuple(CompressionPlan.of(row.levels or {}).levels for row in chosen)
                if chosen[0].levels is not None
                else tuple(dict.fromkeys(row.mask, "removed") for row in chosen),
                {
                    "calibration": tuple(row.loss_calibration for row in chosen),
                    "test": tuple(row.loss for row in chosen),
                },
                tuple(row.fits for row in chosen),
            )
        )
    return Entry(
        name=look(method).label,
        comparison=comparison.name,
        description=look(method).what,
        runs=tuple(runs),
        evaluations=float(np.median([row.evaluations for row in own])),
        setup_evaluations=max(row.setup_evaluations for row in own),
        decision_s=float(np.median([row.decision_s for row in own])),
        origin={"records": f"results/{comparison.records}", "method": method},
    )


def mean_return(task: PinnedTask) -> float:
    """Return the mean return of the best measured plans on requests of a task's workload."""
    env: Any = gymnasium.make(task.environment, **task.arguments).unwrapped
    scorer = env.context.scorer
    env.reset(seed=0)
    returns = []
    for _ in range(_THRESHOLD_REQUESTS):
        env.reset()
        best = env.context.best_measured(env.request)
        returns.append(scorer.dense_nll - scorer.nll(best))
    return float(np.mean(returns))


def check_entry(
    entry: Entry,
    memory: Any,
    requests: Sequence[Request],
    scorers: Mapping[str, MaskScorer],
    on_plan: Callable[[], object] = lambda: None,
) -> list[str]:
    """Replay the plans of an entry.

    Args:
        entry: The entry.
        memory: Byte arithmetic of the model.
        requests: The requests of its comparison.
        scorers: A scorer of the real model for each split to check.
        on_plan: Called after each plan.

    Returns:
        What does not reproduce, one sentence each.
    """
    wrong = []
    for run in entry.runs:
        if len(run.plans) != len(requests):
            return [f"It has {len(run.plans)} plans for {len(requests)} requests."]
        for number, (levels, request) in enumerate(zip(run.plans, requests, strict=True)):
            plan = simplest(CompressionPlan.of(levels))
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
                found = scorer.nll(plan) - scorer.dense_nll
                if not math.isclose(stated, found, rel_tol=TOLERANCE_SHARE, abs_tol=TOLERANCE_NLL):
                    wrong.append(f"{where}, {split}: ΔNLL {stated:.4f} stated, {found:.4f} found.")
            on_plan()
    return wrong


@click.group(help=__doc__)
def main() -> None:
    """Check or publish entries."""


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True), help="The file of the held-out text.")
@click.option("--text-field", default="page", show_default=True)
@click.option("--every", default=1, show_default=True, help="Check each n-th request only.")
@click.option("--threads", default=1, show_default=True)
def check(file: Path, text: str | None, text_field: str, every: int, threads: int) -> None:
    """Replay the plans of FILE on the real model."""
    try:
        wrong = _check(file, text, text_field, every, threads)
    except RapError as error:
        fail(str(error))
    for line in wrong:
        say(line)
    if wrong:
        fail(f"{file} does not reproduce: {len(wrong)} differences.")
    say(f"{file} reproduces.")


def _check(file: Path, text: str | None, text_field: str, every: int, threads: int) -> list[str]:
    import torch

    from rap_env.llm.progress import progress_bar
    from rap_env.scoring.corpus import CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import MaskScorer

    torch.set_num_threads(threads)
    entry = Entry.load(file)
    live = [
        task
        for task in pinned_tasks().values()
        if task.comparison == entry.comparison and task.live
    ]
    if not live:
        raise ExperimentError(
            f"The comparison {entry.comparison} has no task with the real model, so its entries "
            "cannot be replayed here."
        )
    (task,) = live
    context = task.make().unwrapped.context  # type: ignore[attr-defined]
    scorers = {"calibration": context.scorer}
    if text is not None:
        names = ("windows", "window_tokens", "seed", "role")
        settings = {name: task.test_text[name] for name in names}
        corpus = load_corpus(CorpusConfig(text, field=text_field, **settings), context.llm)
        if corpus.sha256 != task.test_text["sha256"]:
            raise ExperimentError(
                f"{text} gives other tokens (SHA-256 {corpus.sha256[:12]}) than the test text "
                f"({task.test_text['sha256'][:12]}): {dict(task.test_text)}."
            )
        scorers["test"] = MaskScorer(context.llm, corpus, context.store)
    kept = range(0, len(task.requests), every)
    requests = [task.requests[number] for number in kept]
    short = Entry(
        entry.name,
        entry.comparison,
        entry.description,
        tuple(_part(run, kept) for run in entry.runs if len(run.plans) == len(task.requests)),
    )
    if len(short.runs) < len(entry.runs):
        return [f"A run has not {len(task.requests)} plans, one for each request."]
    total = len(short.runs) * len(requests)
    with progress_bar(True, total=total, desc="replay", unit="plan") as bar:
        return check_entry(short, context.memory, requests, scorers, bar.update)


def _part(run: Run, kept: Sequence[int]) -> Run:
    """Return a run at some of its requests."""
    return Run(
        run.seed,
        tuple(run.plans[number] for number in kept),
        {split: tuple(values[n] for n in kept) for split, values in run.delta_nll.items()},
        tuple(run.fits[number] for number in kept),
    )


@main.command()
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path))
def publish(results: Path) -> None:
    """Make the pinned tasks and our entries from the records."""
    described = {}
    for comparison in COMPARISONS:
        folder = results / comparison.records / "evaluate"
        rows = [row for path in sorted(folder.rglob("results.jsonl")) for row in read_rows(path)]
        rows = [row for row in rows if row.part == "grid"]
        depends_on = rows[0].provenance["depends_on"]
        described[comparison.name] = {
            "environment": comparison.environment,
            "arguments": comparison.arguments,
            "tasks": comparison.tasks,
            "requests": [
                [one.batch_size, one.seq_len_tokens, one.budget_bytes] for one in requests_of(rows)
            ],
            "calibration_sha256": depends_on["calibration_sha256"],
            "test_text": depends_on["report_text"],
            "reward_threshold": 0.0,
        }
        for entry in make_entries(comparison, rows):
            name = entry.origin["method"]
            entry.save(ENTRIES / comparison.name / f"{name}.json")
    _write_tasks(described)
    pinned_tasks.cache_clear()
    for comparison in COMPARISONS:
        task = pinned_tasks()[next(iter(comparison.tasks))]
        described[comparison.name]["reward_threshold"] = mean_return(task)
    _write_tasks(described)
    say(f"{TASKS_FILE} and {sum(1 for _ in ENTRIES.rglob('*.json'))} entries are written.")


def _write_tasks(described: Mapping[str, Any]) -> None:
    with atomic_write(TASKS_FILE) as file:
        file.write((json.dumps(described, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

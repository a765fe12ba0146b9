"""``python -m experiments.leaderboard``: check entries of the leaderboard, or publish our own.

``check FILE`` replays the plans of an entry on the real model and on held-out text, and refuses
numbers that do not reproduce. ``judge TASK FOLDER`` evaluates the policies of a training sweep.
``publish`` makes the entries of our methods from the records in ``results/``; ``lowest COMPARISON``
measures one of them, the plan with every item at its lowest level.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gymnasium
import numpy as np

import rap_env
from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.comparison.run_records import TrainingRun, training_dirs
from experiments.study.console import ExperimentError, fail, say
from experiments.study.json_records import write_records, write_text
from experiments.study.plotting import look
from rap_env.errors import RapError
from rap_env.leaderboard.entries import ENTRIES, UNCHOSEN, Entry, Run, published_entries
from rap_env.leaderboard.evaluation import Evaluation
from rap_env.leaderboard.tasks import SPLITS, PinnedTask, pinned_task, tasks_of
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer

TOLERANCE_NLL, TOLERANCE_SHARE = 0.01, 0.02
"""Nats per token, and share of ΔNLL: other processors round bfloat16 differently."""


def check_entry(
    entry: Entry,
    memory: MemoryModel,
    requests: Sequence[Request],
    scorers: Mapping[str, MaskScorer],
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
                actual = scorer.nll(plan) - scorer.dense_nll
                if not math.isclose(stated, actual, rel_tol=TOLERANCE_SHARE, abs_tol=TOLERANCE_NLL):
                    wrong.append(f"{where}, {split}: ΔNLL {stated:.4f} stated, {actual:.4f} found.")
            on_plan()
    return wrong


def check_file(
    file: Path, text: str | None, text_field: str, every: int, threads: int
) -> list[str]:
    """Replay the plans of an entry's file on the real model.

    Args:
        file: The entry.
        text: The file of the held-out text; None checks the calibration text only.
        text_field: Its field with the text.
        every: Check each n-th request only.
        threads: Threads of torch.

    Returns:
        What does not reproduce, one sentence each.

    Raises:
        ExperimentError: The comparison has no task with the real model.
        CorpusError: The text gives other tokens.
    """
    import torch

    from rap_env.models.progress import progress_bar
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import MaskScorer

    torch.set_num_threads(threads)
    entry = Entry.load(file)
    task = task_of(entry.comparison)
    if not task.live:
        raise ExperimentError(
            f"The comparison {entry.comparison} has no task with the real model, so its entries "
            "cannot be replayed here."
        )
    # Plans are replayed, not chosen, so that no importance has to be measured.
    context = task.make(importance="none").unwrapped.context  # type: ignore[attr-defined]
    scorers = {"calibration": context.scorer}
    if text is not None:
        corpus = load_corpus(held_out_text(task, text, text_field), context.llm)
        scorers["test"] = MaskScorer(context.llm, corpus, context.store)
    total = len(entry.runs) * len(range(0, len(task.requests), every))
    with progress_bar(True, total=total, desc="replay", unit="plan") as bar:
        return check_entry(
            entry, context.memory, task.requests, scorers, every=every, on_plan=bar.update
        )


def task_of(comparison: str) -> PinnedTask:
    """Return the task of a comparison with the real model, or that with its score table."""
    return max(tasks_of(comparison), key=lambda task: task.live)


def held_out_text(task: PinnedTask, text: str, text_field: str) -> CorpusConfig:
    """Return the test text of a task, from a file; other text is refused when it is read."""
    settings = {name: task.test_text[name] for name in ("windows", "window_tokens", "seed", "role")}
    return CorpusConfig(text, field=text_field, **settings, sha256=task.test_text["sha256"])


def judge_runs(task: str, root: Path, split: str) -> Iterator[tuple[TrainingRun, Evaluation]]:
    """Evaluate the finished training runs below ``root/train`` on a pinned task with a score table.

    Yields each run with its result; all rows replace ``root/evaluate/TASK-SPLIT/results.jsonl`` at
    the end.

    Raises:
        ExperimentError: There are no finished runs.
        RapError: A policy cannot be loaded, or it does not fit the task.
    """
    from agents.trained_policy import TrainedPolicy  # the other commands need no agents

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
        for row in result.rows():
            row["provenance"]["depends_on"]["method"] = {"run": run.label}
            rows.append({**row, "seed": run.seed, "training_s": run.facts.get("training_s")})
    env.close()
    name = f"{task.rpartition('/')[2]}-{split}"
    write_records(root / "evaluate" / name / "results.jsonl", rows)


TASKS_FILE = ENTRIES.parent / "tasks.json"
"""The pinned comparisons: environment and arguments, requests, texts and thresholds."""

_DENSE, LOWEST = UNCHOSEN
_NAMES = {
    _DENSE: ("Do nothing", "the model as it is, over every budget"),
    LOWEST: ("Remove everything", "every item at its lowest level"),
}
"""Names and descriptions of what needs no method, by its name in records."""

_THRESHOLD_REQUESTS = 1000


def grid_rows(comparison: str, results: Path) -> list[ResultRow]:
    """Return the rows of a comparison's grid, from its records and those of `lowest`."""
    (records,) = {Path(entry.origin["records"]).name for entry in published_entries(comparison)}
    rows = [row for row in rows_below(results / records / "evaluate") if row.part == "grid"]
    return rows + ResultRow.read(lowest_file(comparison, results))


def lowest_file(comparison: str, results: Path) -> Path:
    """Return the file with the rows of the plan with every item at its lowest level."""
    return results / "leaderboard" / f"{comparison}.jsonl"


def requests_of(rows: Sequence[ResultRow]) -> list[Request]:
    """Return the requests of some rows, in their order."""
    return list(dict.fromkeys(Request(*row.shape, row.budget_bytes) for row in rows))


def make_entries(comparison: str, rows: Sequence[ResultRow], records: str) -> list[Entry]:
    """Return an entry for each method, with the plans of all its seeds.

    Args:
        comparison: Name of the comparison.
        rows: Its rows.
        records: Where they are from, as the entry says it.
    """
    entries, requests = [], requests_of(rows)
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        runs = []
        for seed in dict.fromkeys(row.seed for row in own):
            at = {Request(*row.shape, row.budget_bytes): row for row in own if row.seed == seed}
            chosen = [at[request] for request in requests]
            delta_nll = {
                "calibration": tuple(row.calibration_delta_nll for row in chosen),
                "test": tuple(row.delta_nll for row in chosen),
            }
            plans = tuple(row.plan.levels for row in chosen)
            runs.append(Run(seed, plans, delta_nll, tuple(row.fits for row in chosen)))
        name, description = _NAMES.get(method, (look(method).label, look(method).what))
        entries.append(
            Entry(
                name=name,
                comparison=comparison,
                description=description,
                runs=tuple(runs),
                evaluations=float(np.median([row.evaluations for row in own])),
                setup_evaluations=max(row.setup_evaluations for row in own),
                decision_s=float(np.median([row.decision_s for row in own])),
                origin={"records": records, "method": method},
            )
        )
    return entries


def mean_return(env: Any) -> float:
    """Return the mean return of the best measured plans on requests of an environment's workload.

    Args:
        env: The environment of a pinned task on a score table.
    """
    scorer = env.context.scorer
    env.reset(seed=0)
    returns = []
    for _ in range(_THRESHOLD_REQUESTS):
        env.reset()
        best = env.context.best_measured(env.request)
        returns.append(scorer.dense_nll - scorer.nll(best))
    return float(np.mean(returns))


def publish(results: Path) -> int:
    """Make requests, texts and entries from the records; return the number of entries.

    Environments, arguments and names of tasks are those that `TASKS_FILE` has.
    """
    described = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    for comparison, pinned in described.items():
        rows = grid_rows(comparison, results)
        records = published_entries(comparison)[0].origin["records"]
        pinned["requests"] = [
            [request.batch_size, request.seq_len_tokens, request.budget_bytes]
            for request in requests_of(rows)
        ]
        pinned["calibration_sha256"] = rows[0].depends_on["calibration_sha256"]
        pinned["test_text"] = rows[0].depends_on["report_text"]
        table = next(iter(pinned["tasks"].values()))  # the first task has a score table
        env: Any = gymnasium.make(pinned["environment"], **pinned["arguments"], **table).unwrapped
        pinned["vocab_size"] = env.memory.facts.vocab_size
        pinned["reward_threshold"] = mean_return(env)
        for entry in make_entries(comparison, rows, records):
            entry.save(ENTRIES / comparison / f"{entry.origin['method']}.json", compress=True)
    write_text(TASKS_FILE, json.dumps(described, indent=1) + "\n")
    return sum(1 for _ in ENTRIES.rglob("*.json"))


@click.group()
def main() -> None:
    """Check entries of the leaderboard, evaluate trained policies, or publish our own."""


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True), help="The file of the held-out text.")
@click.option("--text-field", default="page", show_default=True)
@click.option("--every", default=1, show_default=True, help="Check each n-th request only.")
@click.option("--threads", default=1, show_default=True)
def check(file: Path, text: str | None, text_field: str, every: int, threads: int) -> None:
    """Replay the plans of FILE on the real model, and refuse what does not reproduce."""
    try:
        wrong = check_file(file, text, text_field, every, threads)
    except RapError as error:
        fail(str(error))
    for line in wrong:
        say(line)
    if wrong:
        fail(f"{file} does not reproduce: {len(wrong)} differences.")
    say(f"{file} reproduces.")


@main.command()
@click.argument("task")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True)
def judge(task: str, folder: Path, split: str) -> None:
    """Evaluate the training runs of a comparison's FOLDER on the pinned TASK.

    The rows, in FOLDER/evaluate, are those that experiments.compare reads.
    """
    try:
        for run, result in judge_runs(task, folder, split):
            say(
                f"{run.label}: ΔNLL {result.mean_delta_nll:.4f} nats per token "
                f"({result.num_predicted} of {len(result.cells)} predicted)"
            )
    except RapError as error:
        fail(str(error))


@main.command("lowest")
@click.argument("comparison", type=click.Choice(list(json.loads(TASKS_FILE.read_text()))))
@click.option("--text", default="data/wikitext/validation.jsonl", show_default=True)
@click.option("--text-field", default="page", show_default=True)
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path))
def lowest_plan(comparison: str, text: str, text_field: str, results: Path) -> None:
    """Measure the plan with every item at its lowest level at the requests of COMPARISON."""
    task = task_of(comparison)
    # Nothing is chosen, so that no importance has to be measured.
    plan = task.make(importance="none").unwrapped.ladder.lowest  # type: ignore[attr-defined]
    held_out = held_out_text(task, text, text_field) if task.live else None
    result = rap_env.evaluate(StaticPolicy(plan), task.name, "test", name=LOWEST, text=held_out)
    write_records(lowest_file(comparison, results), result.rows())
    say(f"{lowest_file(comparison, results)}: ΔNLL {result.mean_delta_nll:.4f} nats per token")


@main.command("publish")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path))
def publish_entries(results: Path) -> None:
    """Make the pinned tasks and our entries from the records."""
    entries = publish(results)
    say(f"{TASKS_FILE} and {entries} entries are written.")


if __name__ == "__main__":
    main()

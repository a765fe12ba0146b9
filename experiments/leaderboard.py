"""``python -m experiments.leaderboard``: check entries of the leaderboard, or judge trainings.

``check FILE`` replays the plans of an entry on the real model and on held-out text, and
refuses numbers that do not reproduce. ``judge TASK FOLDER`` evaluates the policies of a
training sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rap_env
from experiments.comparison.run_records import TrainingRun, training_dirs
from experiments.study.console import ExperimentError, fail, say
from experiments.study.json_records import write_records
from rap_env.errors import RapError
from rap_env.leaderboard.entries import Entry
from rap_env.leaderboard.evaluation import Evaluation
from rap_env.leaderboard.tasks import SPLITS, PinnedTask, pinned_task, tasks_of
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig

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
    from rap_env.scoring.scorer import PlanScorer

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
        scorers["test"] = PlanScorer(context.llm, corpus, context.store)
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

    Yields each run with its result; all rows replace
    ``root/evaluate/TASK-SPLIT/results.jsonl`` at the end.

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


@click.group()
def main() -> None:
    """Check entries of the leaderboard, or evaluate trained policies."""


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


if __name__ == "__main__":
    main()

"""``python -m experiments.long_context``: recall and loss over the length of the context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.console import say
from experiments.contexts import build_context
from experiments.long_context.documents import AnswerLoss, PositionLoss
from experiments.long_context.figures import save_figure
from experiments.long_context.plans import plan_sources
from experiments.long_context.records import (
    ANSWERS,
    LOSSES_FILE,
    POSITIONS,
    TASKS_FILE,
    LossRow,
    TaskRow,
)
from experiments.long_context.tables import Curves, publish
from experiments.study.records import RowFile, row_key
from experiments.study.run_folder import RunFolder, git_state
from experiments.study.statistics import wilson_interval
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext
from rap_env.models.progress import progress_bar
from rap_env.plan import CompressionPlan
from rap_env.request import Request
from rap_env.scoring.long_context_tasks import LongContextTask
from rap_env.scoring.tasks import TaskConfig, TaskScorer

FROZEN = ("model",)
FIGURE_FILE = "long_context.png"


@dataclass(frozen=True)
class _Measure:
    """One measure at one length: a task, or a loss on documents.

    Attributes:
        name: Kind of the task, or measure of the loss.
        length: Tokens of a text.
        passes: Tokens of each pass of the model, for one plan.
        identity: What its values depend on besides model and plan.
        row: Measures a plan; called with it and the fields of `PlanRecord`.
    """

    name: str
    length: int
    passes: list[int]
    identity: dict[str, Any]
    row: Callable[[CompressionPlan, dict[str, Any]], TaskRow | LossRow]


@dataclass(frozen=True)
class _Wanted:
    """A row that belongs to the results.

    Attributes:
        file: Name of its file.
        key: Its key there.
        passes: Tokens of each pass of the model that it takes.
        compute: Measures it.
    """

    file: str
    key: str
    passes: list[int]
    compute: Callable[[], Any]


def long_context(config: Config, folder: Path) -> Path:
    """Measure all plans on all tasks and documents; existing rows are not measured again.

    Returns:
        The run folder, with ``tasks.jsonl``, ``losses.jsonl``, ``tables.md`` and a figure.
    """
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=FROZEN)
    context = build_context(config)
    files: dict[str, RowFile[Any]] = {
        TASKS_FILE: RowFile(folder / TASKS_FILE, TaskRow),
        LOSSES_FILE: RowFile(folder / LOSSES_FILE, LossRow),
    }
    wanted = list(_wanted(config, context))
    todo = [item for item in wanted if not files[item.file].has(item.key)]
    passes = [tokens for item in todo for tokens in item.passes]
    say(
        f"{len(todo)} of {len(wanted)} rows to measure: {len(passes):,} passes of the model over "
        f"{sum(passes):,} tokens, except those whose likelihoods the score store has."
    )
    rows: dict[str, list[Any]] = {name: [] for name in files}
    for item in progress_bar(config.progress, wanted, desc="long context", unit="row"):
        rows[item.file].append(files[item.file].get(item.key, item.compute))
    run.finish(started, rows=len(wanted))
    found = Curves(rows[TASKS_FILE], rows[LOSSES_FILE])
    publish(folder, found)
    if find_spec("matplotlib") is not None:  # an extra, and the tables say the same
        save_figure(found, folder / FIGURE_FILE)
    say(f"{len(wanted)} records in {folder}.")
    return folder


def _wanted(config: Config, context: PruningContext) -> Iterator[_Wanted]:
    """Every row: each measure of each plan, so that a run that is stopped compares all plans."""
    settings, facts, git = config.long_context, context.memory.facts, git_state()
    sources = plan_sources(settings, context)
    for measure in _measures(config, context):
        for source in sources:
            plan = source.plan(context, settings.batch_size, measure.length)
            depends_on = {
                "model_fingerprint": facts.fingerprint,
                "dtype": facts.dtype,
                "weights": facts.weights,
                "plan": plan.levels,
                "measure": measure.identity,
            }
            whole = Request.at_fraction(context.memory, settings.batch_size, measure.length, 1.0)
            fields = {
                "plan": source.name,
                "length": measure.length,
                "levels": plan.levels,
                "peak_bytes": context.memory.peak_bytes(plan, whole),
                "native_peak_bytes": whole.budget_bytes,
                "batch_size": settings.batch_size,
                "provenance": {"depends_on": depends_on, "git": git},
            }
            key = row_key(source.name, measure.name, measure.length, fields["provenance"])
            file = LOSSES_FILE if measure.name in (POSITIONS, ANSWERS) else TASKS_FILE
            compute = partial(measure.row, plan, fields)
            yield _Wanted(file, key, measure.passes, compute)


def _measures(config: Config, context: PruningContext) -> Iterator[_Measure]:
    """All tasks and losses, each at each of its lengths."""
    settings, llm = config.long_context, context.llm
    for kind, task in settings.tasks.items():
        for length in task.lengths:
            name = LongContextTask(kind, length).name
            tasks = TaskConfig((name,), limit=task.questions, seed=config.seed)
            scorer = TaskScorer(llm, tasks, context.store)
            identity = {"task": digest(scorer.context)}
            row = partial(_task_row, scorer, kind)
            yield _Measure(kind, length, scorer.passes[name], identity, row)
    losses: list[tuple[str, PositionLoss | AnswerLoss]] = [
        (POSITIONS, PositionLoss(llm, text, settings.bucket_tokens)) for text in settings.positions
    ]
    if settings.answers.data_root is not None:
        losses += [
            (ANSWERS, AnswerLoss(llm, settings.answers, length))
            for length in settings.answers.lengths
        ]
    for measure, loss in losses:
        compute = partial(_loss_row, loss, measure)
        yield _Measure(measure, loss.length, loss.passes, loss.identity, compute)


def _task_row(
    scorer: TaskScorer, kind: str, plan: CompressionPlan, fields: dict[str, Any]
) -> TaskRow:
    ((name, result),) = scorer.results(plan).items()
    accuracy = result.metrics["acc"]
    low, high = wilson_interval(accuracy, result.documents)
    return TaskRow(
        **fields,
        kind=kind,
        questions=result.documents,
        accuracy=accuracy,
        accuracy_ci_low=low,
        accuracy_ci_high=high,
        chance=scorer.chance[name],
        choice_nll=float(result.choice_nll.mean()),
        right=[int(right) for right in result.per_document["acc"]],
        choice_nlls=[round(float(nll), 5) for nll in result.choice_nll],
        kinds=scorer.kinds(name),
    )


def _loss_row(
    loss: PositionLoss | AnswerLoss, measure: str, plan: CompressionPlan, fields: dict[str, Any]
) -> LossRow:
    values = loss.measure(plan)
    sizes = [high - max(low, 1) for low, high in loss.buckets]  # the first token is not predicted
    return LossRow(
        **fields,
        measure=measure,
        nll=float(np.average(values.mean(axis=0), weights=sizes)),
        buckets=loss.buckets,
        values=np.round(values, 5).tolist(),
    )

"""``python -m experiments.evaluate``: measure each method at each request and budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.comparison.evaluation_cells import (
    ComparedMethod,
    EvaluationCell,
    build_methods,
    check_names,
    evaluation_cells,
)
from experiments.comparison.result_rows import QUALITY, ResultRow, again_depends_on, read_recorded
from experiments.comparison.summaries import Comparison
from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer, make_ladder_bytes, task_config
from experiments.launch import launch
from experiments.study.harness import Job, measured
from experiments.study.json_records import delta_nll_fields, request_field, set_aside, trim_metrics
from experiments.study.run_folder import RunFolder
from experiments.study.statistics import kept_above_chance
from experiments.training.loggers import Loggers, open_loggers
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext, make_encoder
from rap_env.plan import Plan
from rap_env.policies.method import MeasuredChoice, measure_choice
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.scoring.tasks import TaskScorer

log = logging.getLogger(__name__)

_ROWS_EACH = 8  # for each worker


class Evaluator:
    """Measures plans on tasks and on text that no method has used."""

    def __init__(self, config: Config, context: PruningContext) -> None:
        self.context = context
        self.report = held_out_scorer(config.evaluate.text, "report", context, compare=True)
        corpus = self.report.corpus
        self.tasks = None
        if config.evaluate.tasks.names:
            from rap_env.scoring.tasks import TaskScorer

            settings = task_config(config.evaluate.tasks)
            self.tasks = TaskScorer(context.llm, settings, store=context.store)
        self._choices: dict[tuple[int, Request], MeasuredChoice] = {}
        self._warm: set[int] = set()
        self.depends_on: dict[str, Any] = {
            "model_fingerprint": context.memory.facts.fingerprint,
            "dtype": context.memory.facts.dtype,
            "calibration": context.corpus.provenance,
            "calibration_sha256": context.corpus.sha256,
            "report_text": corpus.provenance,
            "report_sha256": corpus.sha256,
            "tasks": self._tasks(config),
            "ladder": config.env.ladder,
        }
        if not config.evaluate.plans:
            self.depends_on["importance"] = self._importance(config)

    def jobs(self, config: Config, cells: Sequence[EvaluationCell]) -> Iterator[Job[ResultRow]]:
        """Yield what is measured: each method at each cell."""
        for method in build_methods(config, self.context):
            depends_on = {**self.depends_on, "method": method.identity}
            for cell in cells:
                identity = (method.name, method.seed, cell.cell, cell.part)
                make = partial(self.measure, method, cell)
                yield Job(ResultRow, identity, depends_on, make, subject=(method, cell))

    def again(self, config: Config) -> Iterator[Job[ResultRow]]:
        """Yield the plans of earlier results, which are measured on this text and these tasks.

        All that describes the choices (method, seed, cell, evaluations, decision time) is kept.
        """
        for row in read_recorded(config.evaluate.plans, self.depends_on):
            identity = (row.method, row.seed, row.cell, row.part)
            depends_on = again_depends_on(row, self.depends_on)
            make = partial(self.measure_again, row)
            yield Job(ResultRow, identity, depends_on, make, subject=row)

    def prepare(self, jobs: Sequence[Job[ResultRow]]) -> None:
        """Let methods choose, and score all plans in one call each, so that workers share them."""
        plans = []
        for job in jobs:
            if isinstance(job.subject, ResultRow):
                plans.append(job.subject.plan)
                continue
            method, cell = job.subject
            if "run" in method.identity and id(method) not in self._warm:
                method.policy.choose(
                    cell.request
                )  # unmeasured: torch initialises at the first call
                self._warm.add(id(method))
            choice = measure_choice(method.policy, cell.request, self.context.scorer)
            self._choices[id(method), cell.request] = choice
            plans.append(choice.plan)
        if self._choices:
            self.context.scorer.nll_many(plans)
        self.report.nll_many(plans)

    def measure_again(self, row: ResultRow) -> ResultRow:
        """Return the row of a recorded plan."""
        return replace(row, **self.losses(row.plan))

    def measure(self, method: ComparedMethod, cell: EvaluationCell) -> ResultRow:
        """Return the row of one choice; an NLL of NaN or infinity is a `NonFiniteScoreError`."""
        request, scorer = cell.request, self.context.scorer
        choice = self._choices.pop((id(method), request))
        plan = choice.plan
        peak_bytes = self.context.memory.peak_bytes(plan, request)
        return ResultRow(
            method=method.name,
            kv_aware=method.kv_aware,
            seed=method.seed,
            request=request_field((request.batch_size, request.seq_len_tokens)),
            budget_fraction=cell.cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=peak_bytes,
            fits=peak_bytes <= request.budget_bytes,
            attn_removed=plan.count_removed("attn"),
            ffn_removed=plan.count_removed("ffn"),
            mask=list(plan.removed_names),
            calibration_delta_nll=float(scorer.nll(plan) - scorer.dense_nll),
            **self.losses(plan),
            decision_s=choice.decision_s,
            evaluations=choice.evaluations,
            setup_evaluations=method.setup_evaluations,
            sparsity=cell.sparsity,
            outside=cell.outside,
            training_s=method.training_s,
            levels=plan.levels,
            target_delta_nll=cell.target_delta_nll,
        )

    def losses(self, plan: Plan) -> dict[str, Any]:
        """Return the fields of a row that are measured on the report text and on tasks."""
        from rap_env.scoring.native_agreement import AgreementScorer

        delta_nll = self.report.window_nll(plan) - self.report.window_nll(Plan())
        unmeasured = dict.fromkeys(("accuracies_norm", "task_documents", *QUALITY))
        values = {**unmeasured, "accuracies": {}, **delta_nll_fields(delta_nll)}
        if isinstance(self.report, AgreementScorer):
            values |= asdict(self.report.agreement(plan))
        return values if self.tasks is None else values | task_fields(self.tasks, plan)

    def _importance(self, config: Config) -> dict[str, Any]:
        """Identify the importance that agents observe; a longer GSI may change their choices."""
        encoder = make_encoder(self.context, config.env.task.layout, **config.env.ladder)
        values = vars(encoder.importance).values()
        return {
            "method": config.importance.method,
            "values": digest([array.tolist() for array in values]),
        }

    def _tasks(self, config: Config) -> dict[str, Any]:
        settings = asdict(config.evaluate.tasks)
        if self.tasks is None:
            return settings
        return {**settings, "chance": self.tasks.chance, "context": digest(self.tasks.context)}


def task_fields(tasks: TaskScorer, plan: Plan) -> dict[str, Any]:
    """Return the fields of a row that are measured on tasks."""
    fields = {
        "accuracies": tasks.accuracies(plan),
        "accuracies_norm": tasks.accuracies(plan, "acc_norm"),
        "task_documents": {name: r.documents for name, r in tasks.results(plan).items()},
        "flipped_answers_share": tasks.flipped_answers_share(plan),
    }
    if not tasks.above_chance:
        return fields
    native = {name: tasks.right_answers(Plan())[name] for name in tasks.above_chance}
    kept = kept_above_chance(tasks.right_answers(plan), native, tasks.chance)
    ends = {"accuracy_above_chance_ci_low": kept.low, "accuracy_above_chance_ci_high": kept.high}
    return {**fields, "accuracy_above_chance": kept.mean, **ends}


def evaluate(config: Config, folder: Path, context: PruningContext | None = None) -> Path:
    """Compare all methods on all cells; existing rows are not computed again.

    With ``evaluate.plans``, the plans of earlier results are measured instead. By default, the
    context is that of the settings.

    Returns:
        The path of ``results.jsonl`` in the folder.
    """
    check_names(config)
    if config.evaluate.tasks.names:
        from rap_env.scoring.lm_eval_tasks import check_scorable

        check_scorable(config.evaluate.tasks.names)
    run, started = RunFolder(folder), time.monotonic()
    context = build_context(config) if context is None else context
    again = config.evaluate.plans
    ladder_bytes = make_ladder_bytes(config, context)
    cells = [] if again else evaluation_cells(config.evaluate, ladder_bytes)
    run.start(config)
    trim_metrics(run.metrics, -1)  # metrics of an evaluation are those of its last run
    with open_loggers(config, folder, job="evaluate") as loggers:
        evaluator = Evaluator(config, context)
        jobs = list(evaluator.again(config) if again else evaluator.jobs(config, cells))
        set_aside(run.results, ResultRow, {job.key for job in jobs})
        at_once = max(1, _ROWS_EACH * config.scoring.workers)
        rows = measured(
            jobs, folder, "evaluate", config.progress, evaluator.prepare, at_once=at_once
        )
        _log_results(Comparison(rows), loggers)
    run.finish(started, rows=len(rows))
    log.info("Evaluation: %d rows in %s.", len(rows), run.results)
    return run.results


def _log_results(comparison: Comparison, loggers: Loggers) -> None:
    metrics = {f"delta_nll/{s.method}": s.delta_nll.mean for s in comparison.summaries}
    for summary in comparison.summaries:
        metrics |= {f"{name}/{summary.method}": mean for name, mean in summary.quality.items()}
    loggers.log(metrics, 0)


if __name__ == "__main__":
    launch("evaluate", evaluate)

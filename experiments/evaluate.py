"""``python -m experiments.evaluate``: measure each method at each request and budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.comparison.evaluation import (
    EvaluationCell,
    Method,
    build_methods,
    check_names,
    evaluation_cells,
)
from experiments.comparison.recorded import again_depends_on, read_recorded
from experiments.comparison.records import ResultRow
from experiments.comparison.summaries import Comparison
from experiments.comparison.tables import summary_table
from experiments.config import Config
from experiments.contexts import (
    build_context,
    described_tasks,
    held_out_scorer,
    ladder_bytes,
    task_config,
)
from experiments.launch import launch
from experiments.study.records import (
    append_record,
    delta_nll_fields,
    read_records,
    row_key,
    trim_metrics,
    write_records,
)
from experiments.study.run_folder import RunFolder, git_state
from experiments.training.loggers import Loggers, open_loggers
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext, item_importance
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.method import MeasuredChoice, measure_choice
from rap_env.request import Request
from rap_env.scoring.plan_runner import chunks

log = logging.getLogger(__name__)

_ROWS_EACH = 8  # for each worker

SET_ASIDE = "results.other.jsonl"
"""Rows of other settings: kept, used again if those settings return, and not reported."""


class Evaluator:
    """Measures masks and plans on tasks and on text that no method has used."""

    def __init__(self, config: Config, context: PruningContext) -> None:
        self.context = context
        self.item_bytes = ladder_bytes(config, context)
        self.report = held_out_scorer(config.evaluate.text, "report", context)
        corpus = self.report.corpus
        self.tasks = None
        if config.evaluate.tasks.names:
            from rap_env.scoring.tasks import TaskScorer

            settings = task_config(config.evaluate.tasks)
            self.tasks = TaskScorer(context.llm, settings, store=context.store)
        self.git = git_state()
        self.depends_on: dict[str, Any] = {
            "model_fingerprint": context.memory.facts.fingerprint,
            "dtype": context.memory.facts.dtype,
            "calibration": context.corpus.provenance,
            "calibration_sha256": context.corpus.sha256,
            "report_text": corpus.provenance,
            "report_sha256": corpus.sha256,
            "tasks": self._tasks(config),
        }
        if not config.evaluate.plans:
            self.depends_on["importance"] = self._importance(config)
        if self.item_bytes is not None:  # rows of masks keep their former keys
            self.depends_on["ladder"] = config.env.ladder
        if context.memory.facts.repair:  # rows without stubs keep their former keys
            self.depends_on["repair"] = context.memory.facts.repair

    def score(self, plans: Sequence[Plan]) -> None:
        """Measure plans on both texts in one call each, so that workers share them."""
        self.context.scorer.nll_many(plans)
        self.report.nll_many(plans)

    def measure(self, method: Method, cell: EvaluationCell, choice: MeasuredChoice) -> ResultRow:
        """Return the row of one choice; an NLL of NaN or infinity is a `NonFiniteScoreError`."""
        plan, request, scorer = choice.plan, cell.request, self.context.scorer
        peak_bytes = self.context.memory.peak_bytes(plan, request)
        return ResultRow(
            method=method.name,
            kv_aware=method.kv_aware,
            seed=method.seed,
            request={"batch_size": request.batch_size, "seq_len_tokens": request.seq_len_tokens},
            budget_fraction=cell.cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=peak_bytes,
            fits=peak_bytes <= request.budget_bytes,
            attn_removed=plan.count_removed("attn"),
            ffn_removed=plan.count_removed("ffn"),
            mask=list(plan.removed_names),
            loss_calibration=float(scorer.nll(plan) - scorer.dense_nll),
            **self.losses(plan),
            decision_s=choice.decision_s,
            evaluations=choice.evaluations,
            setup_evaluations=method.setup_evaluations,
            provenance=self.provenance(method),
            sparsity=cell.sparsity,
            outside=cell.outside,
            training_s=method.training_s,
            levels=None if self.item_bytes is None else plan.levels,
            target_loss=cell.target_delta_nll,
        )

    def losses(self, plan: Plan) -> dict[str, Any]:
        """Return the fields of a row that are measured on the report text and on tasks."""
        delta_nll = self.report.window_nll(plan) - self.report.window_nll(Plan())
        if self.tasks is None:
            none = {"accuracies_norm": None, "task_documents": None}
            return {**delta_nll_fields(delta_nll), "accuracies": {}, **none}
        return {
            **delta_nll_fields(delta_nll),
            "accuracies": self.tasks.accuracies(plan),
            "accuracies_norm": self.tasks.accuracies(plan, "acc_norm"),
            "task_documents": {n: r.documents for n, r in self.tasks.results(plan).items()},
        }

    def provenance(self, method: Method) -> dict[str, Any]:
        """Return what a row depends on; the entry ``method`` is specific to the method."""
        depends_on = {**self.depends_on, "method": method.identity}
        return {"depends_on": depends_on, "git": self.git}

    def key(self, method: Method, cell: EvaluationCell) -> str:
        """Return the identifier that the method's row at a cell will have."""
        return row_key(method.name, method.seed, cell.cell, cell.part, self.provenance(method))

    def _importance(self, config: Config) -> dict[str, Any]:
        """Identify the importance that agents observe; a longer GSI may change their choices."""
        if self.item_bytes is None:
            features = self.context.features
            values = [features.one_shot, features.gsi_rank, features.gsi_marginal_loss]
        else:
            values = list(vars(item_importance(self.context, self.item_bytes)).values())
        return {
            "method": config.importance.method,
            "values": digest([array.tolist() for array in values]),
        }

    def _tasks(self, config: Config) -> dict[str, Any]:
        settings = described_tasks(config.evaluate.tasks)
        if self.tasks is None:
            return settings
        return {**settings, "chance": self.tasks.chance, "context": digest(self.tasks.context)}


def evaluate(config: Config, folder: Path) -> Path:
    """Compare all methods on all cells; existing rows are not computed again.

    With ``evaluate.plans``, the plans of earlier results are measured instead.

    Returns:
        The path of ``results.jsonl`` in the folder.
    """
    check_names(config)
    if config.evaluate.tasks.names:
        from rap_env.scoring.lm_eval_tasks import check_scorable

        check_scorable(config.evaluate.tasks.names)
    run, started = RunFolder(folder), time.monotonic()
    context = build_context(config)
    again = config.evaluate.plans
    item_bytes = ladder_bytes(config, context)
    cells = [] if again else evaluation_cells(config.evaluate, context.memory, item_bytes)
    run.start(config)
    trim_metrics(run.metrics, -1)  # metrics of an evaluation are those of its last run
    with open_loggers(config, folder, job="evaluate") as loggers:
        evaluator = Evaluator(config, context)
        if again:
            rows = measured_again(config, run, evaluator)
        else:
            rows = _all_rows(config, run, evaluator, cells)
        _log_results(Comparison(rows), loggers)
    run.finish(started, rows=len(rows))
    log.info("Evaluation: %d rows in %s.", len(rows), run.results)
    return run.results


def _all_rows(
    config: Config, run: RunFolder, evaluator: Evaluator, cells: list[EvaluationCell]
) -> list[ResultRow]:
    """Return rows of all methods on all cells; each new row is appended to the results."""
    methods = list(build_methods(config, evaluator.context))
    wanted = [(evaluator.key(method, cell), method, cell) for method in methods for cell in cells]
    found = sort_out(run, {key for key, *_ in wanted})
    todo = [item for item in wanted if item[0] not in found]
    if found:
        log.info("Evaluation: %d of %d rows exist already.", len(found), len(wanted))
    warm: set[int] = set()
    with progress_bar(
        config.progress, initial=len(found), total=len(wanted), desc="evaluate", unit="row"
    ) as bar:
        for group in chunks(todo, _rows_together(config)):
            choices = []
            for _, method, cell in group:
                bar.set_postfix_str(method.name)
                if id(method) not in warm:
                    _warm_up(method, cell.request)
                    warm.add(id(method))
                choices.append(
                    measure_choice(method.policy, cell.request, evaluator.context.scorer)
                )
            evaluator.score([choice.plan for choice in choices])
            for (key, method, cell), choice in zip(group, choices, strict=True):
                found[key] = evaluator.measure(method, cell, choice)
                append_record(run.results, found[key].to_record())
                bar.update()
    return list(found.values())


def _rows_together(config: Config) -> int:
    """Rows whose plans are scored together: several for each worker, or one in this process."""
    return max(1, _ROWS_EACH * config.scoring.workers)


def measured_again(config: Config, run: RunFolder, evaluator: Evaluator) -> list[ResultRow]:
    """Measure the plans of earlier results on the report text and tasks of this evaluation.

    All that describes the choices (method, seed, cell, evaluations, decision time) is kept.
    """
    wanted: dict[str, tuple[ResultRow, dict[str, Any]]] = {}
    for row in read_recorded(config.evaluate.plans, evaluator.depends_on):
        depends_on = again_depends_on(row, evaluator.depends_on)
        provenance: dict[str, Any] = {"depends_on": depends_on, "git": evaluator.git}
        wanted[replace(row, provenance=provenance).key] = row, provenance
    found = sort_out(run, set(wanted))
    todo = [key for key in wanted if key not in found]
    with progress_bar(config.progress, total=len(todo), desc="evaluate", unit="row") as bar:
        for group in chunks(todo, _rows_together(config)):
            evaluator.report.nll_many([wanted[key][0].plan for key in group])
            for key in group:
                row, provenance = wanted[key]
                found[key] = replace(row, **evaluator.losses(row.plan), provenance=provenance)
                append_record(run.results, found[key].to_record())
                bar.update()
    return list(found.values())


def sort_out(run: RunFolder, wanted: set[str]) -> dict[str, ResultRow]:
    """Keep the wanted rows in the results, and move all others to `SET_ASIDE`.

    Returns:
        The wanted rows that exist, by key.
    """
    aside = run.path / SET_ASIDE
    rows = [ResultRow.from_record(r) for r in [*read_records(aside), *read_records(run.results)]]
    known = {row.key: row for row in rows}
    others = [row.to_record() for key, row in known.items() if key not in wanted]
    found = {key: row for key, row in known.items() if key in wanted}
    if others:
        write_records(aside, others)
    write_records(run.results, [row.to_record() for row in found.values()])
    return found


def _warm_up(method: Method, request: Request) -> None:
    """Let a trained policy choose once unmeasured, because torch initialises at the first call."""
    if "run" in method.identity:
        method.policy.choose(request)


def _log_results(comparison: Comparison, loggers: Loggers) -> None:
    loggers.table("results/summary", *summary_table(comparison))
    header = ["method", "seed", "request", "budget", "loss", "attn_removed", "ffn_removed",
              "peak_bytes", "budget_bytes", "fits", "evaluations", "decision_s"]  # fmt: skip
    rows = [
        [
            row.method, row.seed, f"{row.shape[0]}x{row.shape[1]}", row.budget_fraction, row.loss,
            row.attn_removed, row.ffn_removed, row.peak_bytes, row.budget_bytes, row.fits,
            row.evaluations, row.decision_s,
        ]
        for row in comparison.rows
    ]  # fmt: skip
    loggers.table("results/rows", header, rows)
    metrics = {f"loss/{s.method}": s.delta_nll.mean for s in comparison.summaries}
    loggers.log(metrics, 0)


if __name__ == "__main__":
    launch("evaluate", evaluate)

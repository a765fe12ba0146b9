"""``python -m experiments.evaluate``: measure each method at each request and budget."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.result_rows import QUALITY, ResultRow
from experiments.comparison.run_records import TABLE_FILE, TrainingRun, finished_trainings
from experiments.comparison.summaries import REFERENCE, Comparison
from experiments.config import Config
from experiments.contexts import (
    EvaluationCell,
    build_context,
    evaluation_cells,
    held_out_text,
    make_ladder_bytes,
)
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, delta_nll_fields, measured, set_aside
from experiments.study.json_records import trim_metrics
from experiments.study.loggers import Loggers, open_loggers
from experiments.study.run_folder import RunFolder
from experiments.study.statistics import kept_above_chance
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext, make_encoder, method_order
from rap_env.context.table import TableContext
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import check_policy, make_method
from rap_env.policies.method import measure_choice
from rap_env.scoring.lm_eval_tasks import TaskConfig, check_scorable
from rap_env.scoring.native_agreement import AgreementScorer
from rap_env.scoring.score_table import ScoreTable
from rap_env.scoring.tasks import TaskScorer

log = logging.getLogger(__name__)

Scores = Callable[[Sequence[Plan]], Sequence[float]]


@dataclass(frozen=True)
class ComparedMethod:
    """One method with one seed.

    Attributes:
        seed: Seed of the agent or the random baseline; None for deterministic methods.
        setup_evaluations: Plans scored once, before any request.
        identity: What the choices depend on besides the context, as plain values.
        training_s: Seconds of training; None if not recorded.
    """

    name: str
    seed: int | None
    setup_evaluations: int
    policy: Policy
    identity: dict[str, Any]
    training_s: float | None = None


def check_names(config: Config) -> None:
    """Check the names of baselines and run folders before anything is measured.

    Raises:
        UnknownNameError: There is no such baseline.
        PluginError: A baseline of another package cannot be loaded.
        ExperimentError: A folder holds no training run, or there is nothing to compare.
    """
    for name in config.evaluate.baselines:
        check_policy(name)
    folders = agent_folders(config)
    for folder in folders:
        _ = TrainingRun(folder).facts  # raises an error if it is no training run
    if not folders and not config.evaluate.baselines:
        raise ExperimentError(
            "There is nothing to evaluate: no finished training in "
            f"{config.stage_dir('train')}, and evaluate.baselines is empty."
        )


def agent_folders(config: Config) -> list[Path]:
    """Return the run folders of the agents to evaluate: the configured or all finished ones."""
    if config.evaluate.agents is not None:
        return [Path(folder) for folder in config.evaluate.agents]
    return finished_trainings(config.root)


def build_methods(config: Config, context: PruningContext) -> Iterator[ComparedMethod]:
    """Yield the native model, the trained agents, then the baselines."""
    ladder_bytes = make_ladder_bytes(config, context)
    yield _baseline(REFERENCE, None, context, ladder_bytes)
    for folder in agent_folders(config):
        for best_of in dict.fromkeys(config.evaluate.best_of):
            default = best_of == config.evaluate.best_of[0]
            yield _agent(config, folder, context, best_of, default)
    for name in config.evaluate.baselines:
        if name == REFERENCE:
            continue
        seeds: list[int | None] = [*config.evaluate.random_seeds] if name == "random" else [None]
        for seed in seeds:
            yield _baseline(name, seed, context, ladder_bytes)


def _baseline(
    name: str, seed: int | None, context: PruningContext, ladder_bytes: LadderBytes
) -> ComparedMethod:
    baseline = make_method(name, context, ladder_bytes, seed or 0)
    identity = {"baseline": name}
    if baseline.table_sha256 is not None:
        identity["table"] = baseline.table_sha256
    if baseline.source_sha256 is not None:
        identity["source"] = baseline.source_sha256
    return ComparedMethod(name, seed, baseline.setup_evaluations, baseline, identity)


def decision_scores(folder: Path) -> Scores | None:
    """Return the predictor by which an agent selects the best of its sampled plans.

    Returns:
        The score table that the run was trained on (`TABLE_FILE` in its folder), which
        predicts NLL; None if it was trained on a model, so that the samples are measured.
    """
    path = folder / TABLE_FILE
    if not path.exists():
        return None
    table = TableContext(ScoreTable.load(path), path.name, importance="one_shot")
    return table.scorer.nll_many


def _agent(
    config: Config, folder: Path, context: PruningContext, best_of: int, default: bool
) -> ComparedMethod:
    """Load a trained agent; its name states `best_of` unless that is the default."""
    run = TrainingRun(folder)
    method = run.method
    identity: dict[str, Any] = {"run": folder.name}
    scores = decision_scores(folder) if best_of > 1 else None
    if not default:
        method = f"{method}-best_of={best_of}"
    if best_of > 1:
        table = folder / TABLE_FILE
        digest = hashlib.sha256(table.read_bytes()).hexdigest() if scores else "real"
        identity |= {"best_of": best_of, "scores": digest}
    policy = TrainedPolicy.load(
        folder, context, best_of=best_of, score_plans=scores, scorer=context.scorer
    )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None  # the policy was loaded from it
    identity |= {"step": checkpoint.step, "files": checkpoint.body["files"]}
    setup = int(run.facts.get("evaluations", 0)) + _importance_evaluations(config, context)
    return ComparedMethod(method, run.seed, setup, policy, identity, run.facts.get("training_s"))


def _importance_evaluations(config: Config, context: PruningContext) -> int:
    """Return how many evaluations the importance needed that agents observe."""
    method = config.importance.method
    if method == "none":
        return 0
    return method_order(context, make_ladder_bytes(config, context), method)[1]


class Evaluator:
    """Measures plans on tasks and on text that no method has used.

    Args:
        config: All settings.
        model: The context of the live model, on which plans are measured.
        scores: The context by which methods choose.
    """

    def __init__(self, config: Config, model: PruningContext, scores: PruningContext) -> None:
        self.scores = scores
        corpus = held_out_text(config.evaluate.text, "report", model)
        self.report = AgreementScorer(model.llm, corpus, model.store)
        self.tasks = None
        if config.evaluate.tasks.names:
            tasks = TaskConfig(**asdict(config.evaluate.tasks))
            self.tasks = TaskScorer(model.llm, tasks, store=model.store)
        self._warm: set[int] = set()
        self.depends_on: dict[str, Any] = {
            "model_fingerprint": model.memory.facts.fingerprint,
            "dtype": model.memory.facts.dtype,
            "calibration": model.corpus.provenance,
            "calibration_sha256": model.corpus.sha256,
            "report_text": corpus.provenance,
            "report_sha256": corpus.sha256,
            "tasks": self._tasks(config),
            "ladder": config.env.ladder,
            "importance": self._importance(config),
        }

    def jobs(self, config: Config, cells: Sequence[EvaluationCell]) -> Iterator[Job[ResultRow]]:
        """Yield what is measured: each method at each cell."""
        for method in build_methods(config, self.scores):
            depends_on = {**self.depends_on, "method": method.identity}
            for cell in cells:
                identity = (method.name, method.seed, cell.cell)
                make = partial(self.measure, method, cell)
                yield Job(ResultRow, identity, depends_on, make)

    def measure(self, method: ComparedMethod, cell: EvaluationCell) -> ResultRow:
        """Return the row of one choice; an NLL of NaN or infinity is a `NonFiniteScoreError`."""
        request, scorer = cell.request, self.scores.scorer
        if "run" in method.identity and id(method) not in self._warm:
            method.policy.choose(request)  # unmeasured: torch initialises at the first call
            self._warm.add(id(method))
        choice = measure_choice(method.policy, request, scorer)
        plan = choice.plan
        peak_bytes = self.scores.memory.peak_bytes(plan, request)
        return ResultRow(
            method=method.name,
            seed=method.seed,
            request={
                "batch_size": request.batch_size,
                "seq_len_tokens": request.seq_len_tokens,
            },
            budget_fraction=cell.cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=peak_bytes,
            fits=peak_bytes <= request.budget_bytes,
            calibration_delta_nll=float(scorer.nll(plan) - scorer.native_nll),
            **self.losses(plan),
            decision_s=choice.decision_s,
            evaluations=choice.evaluations,
            setup_evaluations=method.setup_evaluations,
            training_s=method.training_s,
            levels=plan.levels,
            target_delta_nll=cell.target_delta_nll,
        )

    def losses(self, plan: Plan) -> dict[str, Any]:
        """Return the fields of a row that are measured on the report text and on tasks."""
        delta_nll = self.report.window_nll(plan) - self.report.window_nll(Plan())
        unmeasured = dict.fromkeys(("accuracies_norm", "task_documents", *QUALITY))
        values = {**unmeasured, "accuracies": {}, **delta_nll_fields(delta_nll)}
        values |= asdict(self.report.agreement(plan))
        return values if self.tasks is None else values | task_fields(self.tasks, plan)

    def _importance(self, config: Config) -> dict[str, Any]:
        """Identify the importance that agents observe; a longer GSI may change their choices."""
        encoder = make_encoder(self.scores, config.env.task.layout, **config.env.ladder)
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


def evaluate(config: Config, folder: Path, scores: PruningContext | None = None) -> Path:
    """Compare all methods on all cells; existing rows are not computed again.

    Args:
        config: All settings.
        folder: The run folder.
        scores: The context by which methods choose; None for the one in which plans are
            measured.

    Returns:
        The path of ``results.jsonl`` in the folder.
    """
    check_names(config)
    if config.evaluate.tasks.names:
        check_scorable(config.evaluate.tasks.names)
    run, started = RunFolder(folder), time.monotonic()
    model = build_context(config)
    scores = model if scores is None else scores
    ladder_bytes = make_ladder_bytes(config, scores)
    cells = evaluation_cells(config.evaluate, ladder_bytes)
    run.start(config)
    trim_metrics(run.metrics, -1)  # metrics of an evaluation are those of its last run
    with open_loggers(config, folder, job="evaluate") as loggers:
        evaluator = Evaluator(config, model, scores)
        jobs = list(evaluator.jobs(config, cells))
        set_aside(run.results, ResultRow, {job.key for job in jobs})
        rows = measured(jobs, folder, "evaluate", config.progress)
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

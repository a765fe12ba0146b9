"""``python -m experiments.long_context``: recall and loss over the length of the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.contexts import build_context
from experiments.ladder.study import named_policy
from experiments.long_context.documents import AnswerLoss, PositionLoss
from experiments.long_context.figures import over_length
from experiments.long_context.rows import ANSWERS, NATIVE, POSITIONS, Curves, LossRow, TaskRow
from experiments.long_context.tables import long_context_tables
from experiments.study.harness import Job, Study
from experiments.study.tables import percent
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.long_context_tasks import LongContextTask
from rap_env.scoring.tasks import TaskConfig, TaskScorer

PlanOf = Callable[[Request], Plan]
"""Gives a plan for a request, whose budget is the native peak."""


@dataclass(frozen=True)
class _Measure:
    """One measure at one length: a task, or a loss on documents.

    Attributes:
        name: Kind of the task, or measure of the loss.
        length: Tokens of a text.
        identity: What its values depend on besides model and plan.
        row_type: Type of its rows.
        fields: Measures a plan; returns the fields of the row that are its own.
    """

    name: str
    length: int
    identity: dict[str, Any]
    row_type: type[TaskRow] | type[LossRow]
    fields: Callable[[Plan], dict[str, Any]]


def long_context_jobs(config: Config, folder: Path) -> Iterator[Job[TaskRow | LossRow]]:
    """Yield each measure of each plan, so that a run that is stopped compares all plans."""
    settings = config.long_context
    context = build_context(config)
    memory, facts = context.memory, context.memory.facts
    plans = plans_of(config, context)
    for measure in _measures(config, context):
        whole = Request.at_fraction(memory, settings.batch_size, measure.length, 1.0)
        for name, plan_of in plans.items():
            plan = plan_of(whole)
            fields = {
                "plan": name,
                "measure": measure.name,
                "length": measure.length,
                "peak_bytes": memory.peak_bytes(plan, whole),
                "native_peak_bytes": whole.budget_bytes,
                "batch_size": settings.batch_size,
            }
            depends_on = {
                "model_fingerprint": facts.fingerprint,
                "dtype": facts.dtype,
                "weights": facts.weights,
                "plan": plan.levels,
                "measure": measure.identity,
            }
            identity = (name, measure.name, measure.length)
            make = partial(_row, measure, plan, fields)
            yield Job(measure.row_type, identity, depends_on, make)


def plans_of(config: Config, context: PruningContext) -> dict[str, PlanOf]:
    """What gives the plans by their names: uniform caches, the native ones first; then policies.

    Raises:
        UnknownNameError: There is no such policy.
    """
    settings, memory = config.long_context, context.memory

    def uniform(caches: str, _: Request) -> Plan:
        return Plan.uniform(memory.facts.num_layers, caches=caches)

    def chosen(policy: Any, fraction: float, whole: Request) -> Plan:
        shape = whole.batch_size, whole.seq_len_tokens
        plan: Plan = policy.choose(Request.at_fraction(memory, *shape, fraction))
        return plan

    plans: dict[str, PlanOf] = {
        level: partial(uniform, level) for level in dict.fromkeys([NATIVE, *settings.caches])
    }
    named = lru_cache(lambda name: named_policy(name, context, memory))
    for name in settings.policies:
        for fraction in sorted(set(settings.budgets), reverse=True):
            if policy := named(name):
                label = Path(name).stem if Path(name).is_file() else name
                plans[f"{label} {percent(fraction, 0)}"] = partial(chosen, policy, fraction)
    return plans


def _measures(config: Config, context: PruningContext) -> Iterator[_Measure]:
    """All tasks and losses, each at each of its lengths."""
    settings, llm = config.long_context, context.llm
    for kind, task in settings.tasks.items():
        for length in task.lengths:
            name = LongContextTask(kind, length).name
            tasks = TaskConfig((name,), limit=task.questions, seed=config.seed)
            scorer = TaskScorer(llm, tasks, context.store)
            identity = {"task": digest(scorer.context)}
            yield _Measure(kind, length, identity, TaskRow, partial(_answers, scorer, name))
    for text in settings.positions:
        loss = PositionLoss(llm, text, settings.bucket_tokens)
        yield _Measure(POSITIONS, loss.length, loss.identity, LossRow, partial(_losses, loss))
    for length in settings.answers.lengths if settings.answers.data_root is not None else ():
        answers = AnswerLoss(llm, settings.answers, length)
        yield _Measure(ANSWERS, length, answers.identity, LossRow, partial(_losses, answers))


def _answers(scorer: TaskScorer, name: str, plan: Plan) -> dict[str, Any]:
    right = scorer.results(plan)[name].per_document["acc"]
    return {"chance": scorer.chance[name], "right": list(map(int, right)),
            "kinds": scorer.kinds(name)}  # fmt: skip


def _losses(loss: PositionLoss | AnswerLoss, plan: Plan) -> dict[str, Any]:
    return {"buckets": loss.buckets, "values": np.round(loss.measure(plan), 5).tolist()}


def _row(
    measure: _Measure, plan: Plan, fields: dict[str, Any], provenance: dict[str, Any]
) -> TaskRow | LossRow:
    return measure.row_type(**fields, **measure.fields(plan), provenance=provenance)


STUDY = Study(
    "long_context",
    "Long contexts",
    [TaskRow, LossRow],
    long_context_jobs,
    long_context_tables,
    data=Curves,
    figures={"long_context": over_length},
)

"""``python -m experiments.long_context``: recall and loss over the length of the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.contexts import build_context, load_text, named_policy
from experiments.long_context.results import (
    DOCUMENTS,
    NATIVE,
    Curves,
    LossRow,
    TaskRow,
    long_context_tables,
    over_length,
)
from experiments.study.harness import Job, Study
from experiments.study.tables import percent
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext
from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.local_data import read_rows
from rap_env.scoring.long_context_tasks import LongContextTask
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.tasks import TaskScorer


def documents_of(llm: ElasticLLM, text: TextConfig) -> Corpus:
    """Documents that are long enough, cut to the tokens of a window."""
    if text.source == "self":
        return load_text(text, "report", llm)
    if llm.tokenizer is None:
        raise CorpusError(f"{llm.name} has no tokenizer to read documents with.")
    documents: list[list[int]] = []
    rows = read_rows(Path(text.source).expanduser(), (text.field,))
    for document in dict.fromkeys(str(row[text.field]) for row in rows):
        ids = llm.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= text.window_tokens:
            documents.append(ids[: text.window_tokens])
    if len(documents) < text.windows:
        raise CorpusError(
            f"{text.source} has {len(documents)} documents of at least {text.window_tokens} "
            f"tokens, but {text.windows} are needed. Set fewer windows or fewer window_tokens."
        )
    chosen = np.random.default_rng(text.seed).permutation(len(documents))[: text.windows]
    return Corpus.of_tokens(torch.tensor([documents[number] for number in sorted(chosen)]))


Fields = Callable[[Plan], dict[str, Any]]
"""Measures a plan; returns the fields of its row."""


def long_context_jobs(config: Config, folder: Path) -> Iterator[Job[TaskRow | LossRow]]:
    """Yield each measure of each plan, so that a run that is stopped compares all plans."""
    settings = config.long_context
    context = build_context(config)
    memory, facts = context.memory, context.memory.facts
    plans = plans_of(config, context)
    for row_type, measure, length, depends, fields in _measures(config, context):
        whole = Request.at_fraction(memory, settings.batch_size, length, 1.0)
        for name, plan_of in plans.items():
            plan = plan_of(whole)
            described = {
                "plan": name,
                "measure": measure,
                "length": length,
                "peak_bytes": memory.peak_bytes(plan, whole),
                "native_peak_bytes": whole.budget_bytes,
                "batch_size": settings.batch_size,
            }
            depends_on = {
                "model_fingerprint": facts.fingerprint,
                "dtype": facts.dtype,
                "weights": facts.weights,
                "plan": plan.levels,
                "measure": depends,
            }
            make = partial(_row, row_type, fields, plan, described)
            yield Job(row_type, (name, measure, length), depends_on, make)


def _row(
    row_type: type[TaskRow] | type[LossRow],
    fields: Fields,
    plan: Plan,
    described: dict[str, Any],
    provenance: dict[str, Any],
) -> TaskRow | LossRow:
    return row_type(**described, **fields(plan), provenance=provenance)


def plans_of(config: Config, context: PruningContext) -> dict[str, Callable[[Request], Plan]]:
    """What gives the plans by their names: uniform caches, the native ones first; then policies.

    A request has the native peak as its budget.

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

    plans: dict[str, Callable[[Request], Plan]] = {
        level: partial(uniform, level) for level in dict.fromkeys([NATIVE, *settings.caches])
    }
    named = lru_cache(lambda name: named_policy(name, context, memory))
    for name in settings.policies:
        for fraction in sorted(set(settings.budgets), reverse=True):
            if policy := named(name):
                label = Path(name).stem if Path(name).is_file() else name
                plans[f"{label} {percent(fraction, 0)}"] = partial(chosen, policy, fraction)
    return plans


def _measures(
    config: Config, context: PruningContext
) -> Iterator[tuple[type[TaskRow] | type[LossRow], str, int, dict[str, Any], Fields]]:
    """Type of row, measure, length, what values depend on, and fields of each task and loss."""
    settings, llm = config.long_context, context.llm
    for kind, task in settings.tasks.items():
        for length in task["lengths"]:
            name = LongContextTask(kind, length).name
            tasks = TaskConfig((name,), limit=task["questions"], seed=config.seed)
            scorer = TaskScorer(llm, tasks, context.store)
            depends: dict[str, Any] = {"task": digest(scorer.context)}
            yield TaskRow, kind, length, depends, partial(_answers, scorer, name)
    for text in settings.documents:
        corpus = documents_of(llm, text)
        depends = {"text_sha256": corpus.sha256}
        scorer_of_text = MaskScorer(llm, corpus, context.store)
        yield LossRow, DOCUMENTS, text.window_tokens, depends, partial(_losses, scorer_of_text)


def _answers(scorer: TaskScorer, name: str, plan: Plan) -> dict[str, Any]:
    right = scorer.results(plan)[name].per_document["acc"]
    return {"chance": scorer.chance[name], "right": list(map(int, right))}


def _losses(scorer: MaskScorer, plan: Plan) -> dict[str, Any]:
    return {"values": np.round(scorer.window_nll(plan), 5).tolist()}


STUDY = Study(
    "long_context",
    "Long contexts",
    [TaskRow, LossRow],
    long_context_jobs,
    long_context_tables,
    data=Curves,
    figures={"long_context": over_length},
)

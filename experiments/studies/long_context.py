"""``python -m experiments.studies.long_context``: recall and loss over the context's length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.contexts import build_context, named_policy
from experiments.launch import launch
from experiments.study.harness import Job, Published, Study, below, first_section
from experiments.study.json_records import Record
from experiments.study.statistics import paired_difference, wilson_interval
from experiments.study.table_format import (
    TitledTable,
    columns_table,
    crossed_table,
    percent,
    signed,
)
from rap_env.artifacts import digest, read_rows
from rap_env.context.base import PruningContext
from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.long_context_tasks import LongContextTask
from rap_env.scoring.scorer import PlanScorer
from rap_env.scoring.tasks import TaskScorer

NATIVE = "native"
"""Name of the plan that all others are compared with."""
DOCUMENTS = "documents"
"""The measure of losses on documents."""
TITLES = {
    "recall": "Recall",
    "multikey": "Recall of one of several keys",
    "multivalue": "Recall of several values",
    "tracking": "Tracking of chains",
    "counting": "Most common words",
}
"""Titles of the kinds of tasks."""
FACTS = tuple(TITLES)[:-1]
"""Kinds that ask for facts."""
SUMMARY_CAPTION = (
    "Peak bytes of {batch} sequences of {middle:,} tokens, as a share of the native peak. ΔNLL on "
    "documents, nats per token with a 95 % interval over documents. Recall: share of right answers "
    "to questions about facts (all kinds but counting) at {lengths} tokens, with a 95 % interval "
    "over questions; a guess is right in 25 %."
)
KIND_CAPTION = "Share of right answers by length of the text in tokens, with a 95 % interval."


@dataclass(frozen=True)
class LongContextRow(Record):
    """One plan, measured on a task or on documents of one length.

    Attributes:
        plan: Level of all caches, or a policy with its budget.
        measure: Kind of the task; `DOCUMENTS` for a loss.
        length: Tokens of a text.
        peak_bytes: Peak bytes of the plan for a batch of sequences of this length.
        native_peak_bytes: The same of the native model.
        batch_size: Sequences of that batch.
        values: For each question 1 if the answer is right, else 0; of documents the mean NLL
            of each, nats per token.
    """

    file = "long_context.jsonl"
    identity = ("plan", "measure", "length")

    plan: str
    measure: str
    length: int
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int
    values: list[float]


class Measure(NamedTuple):
    """What is measured on texts of one length; see `LongContextRow`."""

    kind: str
    length: int
    text: str
    values: Callable[[Plan], list[float]]


def long_context_jobs(config: Config, folder: Path) -> Iterator[Job[LongContextRow]]:
    """Yield each measure of each plan, so that a run that is stopped compares all plans."""
    context, batch_size = build_context(config), config.long_context.batch_size
    memory = context.memory

    def measured(measure: Measure, name: str, plan: Plan, whole: Request) -> LongContextRow:
        return LongContextRow(
            plan=name,
            measure=measure.kind,
            length=measure.length,
            peak_bytes=memory.peak_bytes(plan, whole),
            native_peak_bytes=whole.budget_bytes,
            batch_size=batch_size,
            values=measure.values(plan),
        )

    plans = plans_of(config, context)
    for measure in measures(config, context):
        whole = Request.at_fraction(memory, batch_size, measure.length, 1.0)
        for name, plan_of in plans.items():
            plan = plan_of(whole)
            identity = name, measure.kind, measure.length
            depends_on = {**memory.facts.identity, "plan": plan.levels, "text": measure.text}
            make = partial(measured, measure, name, plan, whole)
            yield Job(LongContextRow, identity, depends_on, make)


def plans_of(config: Config, context: PruningContext) -> dict[str, Callable[[Request], Plan]]:
    """What gives the plans by their names: uniform caches, the native ones first; then policies.

    A request has the native peak as its budget.

    Raises:
        UnknownNameError: There is no such policy.
    """
    settings, memory = config.long_context, context.memory

    def chosen(policy: Policy, fraction: float, whole: Request) -> Plan:
        shape = whole.batch_size, whole.seq_len_tokens
        return policy.choose(Request.at_fraction(memory, *shape, fraction))

    plans: dict[str, Callable[[Request], Plan]] = {}
    for level in (NATIVE, *settings.caches):
        plan = Plan.uniform(memory.facts.num_layers, caches=level)
        plans[level] = partial(lambda plan, whole: plan, plan)
    for name in settings.policies:
        if policy := named_policy(name, context, memory):
            label = Path(name).stem if Path(name).is_file() else name
            for fraction in settings.budgets:
                plans[f"{label} {percent(fraction, 0)}"] = partial(chosen, policy, fraction)
    return plans


def measures(config: Config, context: PruningContext) -> Iterator[Measure]:
    """Yield each task at each of its lengths, and the loss on each kind of documents."""
    settings, llm = config.long_context, context.llm

    def right_answers(scorer: TaskScorer, name: str, plan: Plan) -> list[float]:
        return list(map(int, scorer.results(plan)[name].per_document["acc"]))

    def losses(scorer: PlanScorer, plan: Plan) -> list[float]:
        return [round(nll, 5) for nll in scorer.window_nll(plan).tolist()]

    for kind, task in settings.tasks.items():
        for length in task.lengths:
            name = LongContextTask(kind, length).name
            tasks = TaskConfig((name,), limit=task.questions, seed=config.seed)
            scorer = TaskScorer(llm, tasks, context.store)
            values = partial(right_answers, scorer, name)
            yield Measure(kind, length, digest(scorer.context), values)
    for text in settings.documents:
        corpus = documents_of(llm, text)
        values = partial(losses, PlanScorer(llm, corpus, context.store))
        yield Measure(DOCUMENTS, text.window_tokens, corpus.sha256, values)


def documents_of(llm: ElasticLLM, text: TextConfig) -> Corpus:
    """Documents that are long enough, cut to the tokens of a window."""
    rows = read_rows(Path(text.source).expanduser(), (text.field,))
    texts = list(dict.fromkeys(str(row[text.field]) for row in rows))
    tokenised = llm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    documents = [ids[: text.window_tokens] for ids in tokenised if len(ids) >= text.window_tokens]
    if len(documents) < text.windows:
        raise CorpusError(
            f"{text.source} has {len(documents)} documents of at least {text.window_tokens} "
            f"tokens, but {text.windows} are needed. Set fewer windows or fewer window_tokens."
        )
    chosen = np.random.default_rng(text.seed).permutation(len(documents))[: text.windows]
    return Corpus.of_tokens(torch.tensor([documents[number] for number in sorted(chosen)]))


def compared_lengths(rows: Sequence[LongContextRow]) -> list[int]:
    """Lengths from 1,024 tokens that all tasks about facts have, or all that there are."""
    kinds = {row.measure for row in rows}.intersection(FACTS)
    found = [{row.length for row in rows if row.measure == kind} for kind in kinds]
    shared = set.intersection(*found) if found else set()
    lengths = sorted(shared or {row.length for row in rows})
    return [length for length in lengths if length >= 1024] or lengths


def long_context_tables(rows: Sequence[LongContextRow]) -> list[TitledTable]:
    """A summary, then each kind of task: plans as lines, lengths as columns."""
    by_key = {(row.plan, row.measure, row.length): row for row in rows}
    plans = {row.plan: row.plan for row in rows}
    documents = [row.length for row in rows if row.measure == DOCUMENTS]
    lengths = compared_lengths(rows)
    middle = lengths[len(lengths) // 2]

    def peak(plan: str) -> str:
        row = next(row for row in rows if (row.plan, row.length) == (plan, middle))
        return percent(row.peak_bytes / row.native_peak_bytes, 0)

    def delta_nll(plan: str) -> str:
        if plan == NATIVE or not documents:
            return "0" if plan == NATIVE else "-"
        native, own = (by_key[n, DOCUMENTS, min(documents)].values for n in (NATIVE, plan))
        return signed(paired_difference(own, native))

    def recall(plan: str) -> str:
        keys = ((plan, kind, length) for kind in FACTS for length in lengths)
        return right_words([value for key in keys if key in by_key for value in by_key[key].values])

    def on_task(kind: str, plan: str, length: int) -> str:
        return right_words(by_key[plan, kind, length].values)

    columns: dict[str, Callable[[str], str]] = {
        "Plan": str,
        f"Bytes, {middle:,}": peak,
        "ΔNLL, documents": delta_nll,
        "Recall": recall,
    }
    caption = SUMMARY_CAPTION.format(
        batch=rows[0].batch_size,
        middle=middle,
        lengths=", ".join(f"{length:,}" for length in lengths),
    )
    tables = [TitledTable(columns_table(plans, columns), "Loss and recall", caption)]
    for kind, title in TITLES.items():
        own = sorted({row.length for row in rows if row.measure == kind})
        if own:
            shown = {f"{length:,}": length for length in own}
            table = crossed_table("Plan", plans, shown, partial(on_task, kind))
            tables.append(TitledTable(table, title, KIND_CAPTION))
    return tables


def right_words(right: Sequence[float]) -> str:
    """Format the share of right answers with its interval in per cent; a dash without any."""
    if not right:
        return "-"
    share = float(np.mean(right))
    low, high = wilson_interval(share, len(right))
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def first_two_sections(text: str) -> str:
    """The summary and the tasks with the longest texts."""
    return below("\n## ".join(text.split("\n## ")[:3]))


STUDY = Study(
    "long_context",
    "Long contexts",
    [LongContextRow],
    long_context_jobs,
    long_context_tables,
    published=[
        Published("long_context", "long_context", first_two_sections),
        Published("tight_recall", "tight_recall/long_context", first_section),
    ],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)

"""``python -m experiments.long_context``: recall and loss over the length of the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.contexts import build_context, load_text, named_policy
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.plotting import FAINT, Panel, draw_series, panel_figure
from experiments.study.statistics import Estimate, paired_difference, wilson_interval
from experiments.study.table_format import Table, TitledTable, crossed_table, percent, signed
from rap_env.artifacts import digest
from rap_env.context.base import PruningContext
from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.local_data import read_rows
from rap_env.scoring.long_context_tasks import LONG_CONTEXT_KINDS, LongContextTask
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.tasks import TaskScorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NATIVE = "native"
"""Name of the plan that all others are compared with."""
DOCUMENTS = "documents"
"""The measure of losses on documents."""

SUMMARY_CAPTION = (
    "Peak bytes of {batch} sequences of {middle} tokens, as a share of the native peak. ΔNLL on "
    "documents of the length with most of them, nats per token with a 95 % interval over "
    "documents. Recall: share of right answers to questions about facts (all kinds but counting) "
    "at {lengths} tokens, with a 95 % interval over questions; a guess is right in {chance}."
)
KIND_CAPTION = (
    "Share of right answers by length of the text in tokens, with a 95 % interval; chance "
    "is {chance}, {questions} questions each."
)
TITLES = {
    "recall": "Recall",
    "multikey": "Recall of one of several keys",
    "multivalue": "Recall of several values",
    "tracking": "Tracking of chains",
    "counting": "Most common words",
}
_COLOURS = (
    "#1F2328", "#2F6DB5", "#C8324B", "#E0812F", "#8E4FA8",
    "#00707F", "#2FA52F", "#6B7178", "#8A5A2B", "#D64FA0",
)  # fmt: skip
_MARKERS = "osD^vPX"  # another number than of colours, so that no two plans look alike


@dataclass(frozen=True, kw_only=True)
class PlanRow(Record):
    """A row of one plan at one length.

    Attributes:
        plan: Level of all caches, or a policy with its budget.
        measure: Kind of the task; `DOCUMENTS` for a loss.
        length: Tokens of a text.
        peak_bytes: Peak bytes of the plan for a batch of sequences of this length.
        native_peak_bytes: The same of the native model.
        batch_size: Sequences of that batch.
    """

    rerun = "run experiments.long_context again"
    identity = ("plan", "measure", "length")

    plan: str
    measure: str
    length: int
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int


@dataclass(frozen=True)
class TaskRow(PlanRow):
    """The result of one plan on one task.

    Attributes:
        chance: Accuracy of guessing.
        right: For each question whether the answer is right.
    """

    file = "tasks.jsonl"
    record_name = "A result of a long-context task"

    chance: float
    right: list[int]


@dataclass(frozen=True)
class LossRow(PlanRow):
    """The loss of one plan on documents.

    Attributes:
        values: Mean NLL of each document, nats per token, (documents,).
    """

    file = "losses.jsonl"
    record_name = "A loss over a long context"

    values: list[float]


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


MakeRow = Callable[[Plan, dict[str, Any]], TaskRow | LossRow]
"""Measures a plan; returns its row, which has the given fields of `PlanRow`."""


def long_context_jobs(config: Config, folder: Path) -> Iterator[Job[TaskRow | LossRow]]:
    """Yield each measure of each plan, so that a run that is stopped compares all plans."""
    settings = config.long_context
    context = build_context(config)
    memory, facts = context.memory, context.memory.facts
    plans = plans_of(config, context)
    for row_type, measure, length, depends, make_row in _measures(config, context):
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
            make = partial(make_row, plan, described)
            yield Job(row_type, (name, measure, length), depends_on, make)


def plans_of(config: Config, context: PruningContext) -> dict[str, Callable[[Request], Plan]]:
    """What gives the plans by their names: uniform caches, the native ones first; then policies.

    A request has the native peak as its budget.

    Raises:
        UnknownNameError: There is no such policy.
    """
    settings, memory = config.long_context, context.memory

    def uniform(caches: str, _: Request) -> Plan:
        return Plan.uniform(memory.facts.num_layers, caches=caches)

    def chosen(policy: Policy, fraction: float, whole: Request) -> Plan:
        shape = whole.batch_size, whole.seq_len_tokens
        return policy.choose(Request.at_fraction(memory, *shape, fraction))

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
) -> Iterator[tuple[type[TaskRow] | type[LossRow], str, int, dict[str, Any], MakeRow]]:
    """Type of row, measure, length, what values depend on, and maker of each task and loss."""
    settings, llm = config.long_context, context.llm
    for kind, task in settings.tasks.items():
        for length in task["lengths"]:
            name = LongContextTask(kind, length).name
            tasks = TaskConfig((name,), limit=task["questions"], seed=config.seed)
            scorer = TaskScorer(llm, tasks, context.store)
            depends: dict[str, Any] = {"task": digest(scorer.context)}
            yield TaskRow, kind, length, depends, partial(_task_row, scorer, name)
    for text in settings.documents:
        corpus = documents_of(llm, text)
        depends = {"text_sha256": corpus.sha256}
        scorer_of_text = MaskScorer(llm, corpus, context.store)
        yield LossRow, DOCUMENTS, text.window_tokens, depends, partial(_loss_row, scorer_of_text)


def _task_row(scorer: TaskScorer, name: str, plan: Plan, described: dict[str, Any]) -> TaskRow:
    right = scorer.results(plan)[name].per_document["acc"]
    return TaskRow(**described, chance=scorer.chance[name], right=list(map(int, right)))


def _loss_row(scorer: MaskScorer, plan: Plan, described: dict[str, Any]) -> LossRow:
    return LossRow(**described, values=np.round(scorer.window_nll(plan), 5).tolist())


def share_of(right: Sequence[int]) -> Estimate:
    """Share of right answers, with a 95 % interval (Wilson) over independent questions."""
    share = sum(right) / len(right)
    return Estimate(share, *wilson_interval(share, len(right)))


class Curves:
    """All rows, by plan, measure and length.

    Attributes:
        plans: Names of the plans, the native one first.
        kinds: Kinds of tasks that there are rows of.
    """

    def __init__(self, rows: Sequence[PlanRow]) -> None:
        self.tasks = [row for row in rows if isinstance(row, TaskRow)]
        self.losses = {(r.plan, r.length): r for r in rows if isinstance(r, LossRow)}
        self._tasks = {(row.plan, row.measure, row.length): row for row in self.tasks}
        self.plans = list(dict.fromkeys(row.plan for row in rows))
        self.kinds = [k for k in LONG_CONTEXT_KINDS if any(r.measure == k for r in self.tasks)]

    def lengths(self, kind: str) -> list[int]:
        """Lengths at which a kind of task was measured."""
        return sorted({row.length for row in self.tasks if row.measure == kind})

    def task(self, plan: str, kind: str, length: int) -> TaskRow | None:
        """The row of a plan on a task."""
        return self._tasks.get((plan, kind, length))

    def facts(self, plan: str) -> list[TaskRow]:
        """Rows of a plan on tasks that ask for facts, at the long lengths."""
        rows = [row for row in self.tasks if row.plan == plan and row.measure != "counting"]
        return [row for row in rows if row.length in self.long]

    @cached_property
    def long(self) -> list[int]:
        """Lengths from 1,024 tokens that all tasks about facts have, or all if there are none."""
        by_kind = [set(self.lengths(kind)) for kind in self.kinds if kind != "counting"]
        lengths = sorted(set.intersection(*by_kind) or set.union(*by_kind)) if by_kind else []
        return [length for length in lengths if length >= 1024] or lengths

    @property
    def compared_length(self) -> int | None:
        """The greatest of the lengths with most documents; None without any."""
        rows = [row for (plan, _), row in self.losses.items() if plan == NATIVE]
        longest = max(rows, key=lambda row: (len(row.values), row.length), default=None)
        return None if longest is None else longest.length


def long_context_tables(data: Curves) -> list[TitledTable]:
    """All tables that there are rows for."""
    tables = []
    if data.tasks:
        chance = percent(data.tasks[0].chance, 0)
        caption = SUMMARY_CAPTION.format(
            batch=data.tasks[0].batch_size,
            middle=f"{data.long[len(data.long) // 2]:,}",
            lengths=", ".join(f"{length:,}" for length in data.long),
            chance=chance,
        )
        tables.append(TitledTable(_summary_table(data), "Loss and recall", caption))
        for kind in data.kinds:
            asked = sorted({len(row.right) for row in data.tasks if row.measure == kind})
            questions = " to ".join(map(str, dict.fromkeys((asked[0], asked[-1]))))
            caption = KIND_CAPTION.format(chance=chance, questions=questions)
            tables.append(TitledTable(_kind_table(data, kind), TITLES[kind], caption))
    return tables


def _summary_table(data: Curves) -> Table:
    """Plans as lines: bytes, losses and recall."""
    middle, length = data.long[len(data.long) // 2], data.compared_length
    header = ["Plan", f"Bytes, {middle:,}", *(["ΔNLL, documents"] if length else []), "Recall"]
    lines = []
    for plan in data.plans:
        rows = [row for row in data.tasks if (row.plan, row.length) == (plan, middle)]
        share = rows[0].peak_bytes / rows[0].native_peak_bytes if rows else None
        deltas = [_delta(data, plan, length)] if length else []
        lines.append([plan, percent(share, 0), *deltas, _share(data.facts(plan))])
    return header, lines


def _delta(data: Curves, plan: str, length: int) -> str:
    """The difference of a loss to that of the native plan, with its interval over documents."""
    if plan == NATIVE:
        return "0"
    row = data.losses.get((plan, length))
    if row is None:
        return "-"
    return signed(paired_difference(row.values, data.losses[NATIVE, length].values))


def _kind_table(data: Curves, kind: str) -> Table:
    """Plans as lines, lengths as columns: the accuracy on one kind of task."""

    def entry(plan: str, length: int) -> str:
        row = data.task(plan, kind, length)
        return _share([row] if row else [])

    lengths = {f"{length:,}": length for length in data.lengths(kind)}
    return crossed_table("Plan", {plan: plan for plan in data.plans}, lengths, entry)


def _share(rows: Sequence[TaskRow]) -> str:
    """Format the share of right answers with its interval in per cent."""
    right = [value for row in rows for value in row.right]
    if not right:
        return "-"
    share = share_of(right)
    return f"{100 * share.mean:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def over_length(data: Curves) -> Figure:
    """Accuracy over length for each kind of task."""
    parts = [
        Panel(partial(_draw_task, data, kind), TITLES[kind], "length of the text (tokens)",
              "right (%)")
        for kind in data.kinds
    ]  # fmt: skip
    return panel_figure(parts, height=2.6)


def _draw_task(data: Curves, kind: str, axis: Axes) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    lengths = data.lengths(kind)
    for number, plan in enumerate(data.plans):
        rows = [row for length in lengths if (row := data.task(plan, kind, length))]
        shares = [share_of(row.right) for row in rows]
        places = [row.length * 1.02 ** (number - len(data.plans) / 2) for row in rows]
        draw_series(
            axis, places, [100 * share.mean for share in shares],
            [(100 * share.low, 100 * share.high) for share in shares],
            color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.3, elinewidth=0.6, label=plan,
        )  # fmt: skip
    axis.axhline(100 * data.tasks[0].chance, color=FAINT, linestyle=":", linewidth=1)
    axis.set_ylim(0, 104)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{length:,}" for length in lengths])


STUDY = Study(
    "long_context",
    "Long contexts",
    [TaskRow, LossRow],
    long_context_jobs,
    long_context_tables,
    data=Curves,
    figures={"long_context": over_length},
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)

"""Tables of results over the length of the context, in Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from experiments.long_context.records import (
    ANSWERS,
    LOSSES_FILE,
    NATIVE,
    POSITIONS,
    TASKS_FILE,
    LossRow,
    TaskRow,
)
from experiments.study.statistics import paired_difference, wilson_interval
from experiments.study.tables import (
    Table,
    TitledTable,
    counted,
    document,
    percent,
    publish_tables,
    signed,
    terminal,
)
from rap_env.scoring.long_context_tasks import LONG_CONTEXT_KINDS

SUMMARY_CAPTION = (
    "Peak bytes of {batch} sequences of {middle} tokens, as a share of the native peak. ΔNLL on "
    "documents of the length with most of them and of answers at the greatest length, nats per "
    "token with a 95 % interval over documents. Recall: share of right answers to questions about "
    "facts (all kinds but counting) at {lengths} tokens, with a 95 % interval over questions; a "
    "guess is right in {chance}."
)
KIND_CAPTION = (
    "Share of right answers by length of the text in tokens, with a 95 % interval; chance "
    "is {chance}, {questions} questions each."
)
DEPTH_CAPTION = (
    "Share of right answers to questions about facts by the place of the fact in the text, in "
    "texts of {length} tokens."
)
POSITION_CAPTION = (
    "NLL of the native model by position in documents of {length} tokens, nats per token, and the "
    "difference to it; {documents}."
)
ANSWER_CAPTION = (
    "NLL of reference answers to questions about meetings that are cut to a number of tokens, and "
    "the difference to it, nats per token of the answer, with a 95 % interval over questions."
)

_LOSSES = {POSITIONS: "ΔNLL, documents", ANSWERS: "ΔNLL, answers"}
_TITLES = {
    "recall": "Recall",
    "multikey": "Recall of one of several keys",
    "multivalue": "Recall of several values",
    "tracking": "Tracking of chains",
    "counting": "Most common words",
}


class Curves:
    """All results, by plan, measure and length.

    Attributes:
        tasks: Rows of tasks.
        losses: Rows of losses.
    """

    def __init__(self, tasks: Sequence[TaskRow], losses: Sequence[LossRow]) -> None:
        self.tasks, self.losses = list(tasks), list(losses)
        self._tasks = {(row.plan, row.kind, row.length): row for row in tasks}
        self._losses = {(row.plan, row.measure, row.length): row for row in losses}

    def __bool__(self) -> bool:
        return bool(self.tasks or self.losses)

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """Read the records of a run folder; empty if there are none."""
        return cls(TaskRow.read(folder / TASKS_FILE), LossRow.read(folder / LOSSES_FILE))

    @cached_property
    def plans(self) -> list[str]:
        """Names of the plans, the native one first."""
        return list(dict.fromkeys(row.plan for row in [*self.tasks, *self.losses]))

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of tasks that there are rows of."""
        found = {row.kind for row in self.tasks}
        return [kind for kind in LONG_CONTEXT_KINDS if kind in found]

    def lengths(self, name: str) -> list[int]:
        """Lengths at which a kind of task or a loss was measured."""
        rows = [(row.kind, row.length) for row in self.tasks]
        rows += [(row.measure, row.length) for row in self.losses]
        return sorted({length for measure, length in rows if measure == name})

    def task(self, plan: str, kind: str, length: int) -> TaskRow | None:
        """The row of a plan on a task."""
        return self._tasks.get((plan, kind, length))

    def loss(self, plan: str, measure: str, length: int) -> LossRow | None:
        """The row of a plan's loss."""
        return self._losses.get((plan, measure, length))

    def facts(self, plan: str, length: int | None = None) -> list[TaskRow]:
        """Rows of a plan on tasks that ask for facts, at one length or at the long ones."""
        return [
            row
            for row in self.tasks
            if row.plan == plan
            and row.kind != "counting"
            and (row.length in self.long if length is None else row.length == length)
        ]

    @cached_property
    def long(self) -> list[int]:
        """Lengths from 1,024 tokens that all tasks about facts have, or all if there are none."""
        by_kind = [set(self.lengths(kind)) for kind in self.kinds if kind != "counting"]
        lengths = sorted(set.intersection(*by_kind) or set.union(*by_kind)) if by_kind else []
        return [length for length in lengths if length >= 1024] or lengths

    def compared_length(self, measure: str) -> int | None:
        """The greatest of the lengths at which a loss has most documents; None without any."""
        rows = [row for row in self.losses if (row.plan, row.measure) == (NATIVE, measure)]
        found = max(rows, key=lambda row: (len(row.values), row.length), default=None)
        return None if found is None else found.length

    @property
    def middle(self) -> int:
        """The middle one of the long lengths."""
        return self.long[len(self.long) // 2]


def title_of(kind: str) -> str:
    """The title of a kind of task."""
    return _TITLES[kind]


def summary_table(found: Curves) -> Table:
    """Plans as lines: bytes, losses and recall."""
    losses = [name for name in (POSITIONS, ANSWERS) if found.lengths(name)]
    header = ["Plan", f"Bytes, {found.middle:,}", *(_LOSSES[name] for name in losses), "Recall"]
    lines = []
    for plan in found.plans:
        rows = [row for row in found.tasks if row.plan == plan]
        shares = [r.peak_bytes / r.native_peak_bytes for r in rows if r.length == found.middle]
        right = [value for row in found.facts(plan) for value in row.right]
        lines.append(
            [
                plan,
                percent(shares[0] if shares else None, 0),
                *(_delta(found, plan, name, found.compared_length(name)) for name in losses),
                share_words(right),
            ]
        )
    return header, lines


def kind_table(found: Curves, kind: str) -> Table:
    """Plans as lines, lengths as columns: the accuracy on one kind of task."""
    lengths = found.lengths(kind)
    lines = []
    for plan in found.plans:
        rows = [found.task(plan, kind, length) for length in lengths]
        lines.append([plan, *(share_words(row.right) if row else "-" for row in rows)])
    return ["Plan", *(f"{length:,}" for length in lengths)], lines


def depth_table(found: Curves, length: int) -> Table:
    """Plans as lines, places of the fact as columns: the accuracy at one length."""
    places = sorted(
        {place for row in found.facts(NATIVE, length) for place in row.kinds}, key=_first_number
    )
    lines = []
    for plan in found.plans:
        cells = []
        for place in places:
            right = [
                value
                for row in found.facts(plan, length)
                for value, kind in zip(row.right, row.kinds, strict=True)
                if kind == place
            ]
            cells.append(share_words(right))
        lines.append([plan, *cells])
    return ["Plan", *places], lines


def position_table(found: Curves, length: int) -> Table:
    """Plans as lines, positions as columns: NLL of the native model, and differences to it."""
    native = found.loss(NATIVE, POSITIONS, length)
    assert native is not None
    header = ["Plan", *(f"{low:,}-{high:,}" for low, high in native.buckets)]
    lines = [[f"{NATIVE} (NLL)", *(f"{value:.3f}" for value in native.by_bucket)]]
    for plan in found.plans:
        row = found.loss(plan, POSITIONS, length)
        if row is not None and plan != NATIVE:
            pairs = zip(row.by_bucket, native.by_bucket, strict=True)
            lines.append([plan, *(f"{value - base:+.3f}" for value, base in pairs)])
    return header, lines


def answer_table(found: Curves) -> Table:
    """Plans as lines, lengths as columns: the loss of answers."""
    lengths = found.lengths(ANSWERS)
    rows = [found.loss(NATIVE, ANSWERS, length) for length in lengths]
    lines = [[f"{NATIVE} (NLL)", *(f"{row.nll:.3f}" if row else "-" for row in rows)]]
    for plan in found.plans:
        if plan != NATIVE:
            lines.append([plan, *(_delta(found, plan, ANSWERS, length) for length in lengths)])
    return ["Plan", *(f"{length:,}" for length in lengths)], lines


def long_context_findings(found: Curves) -> list[str]:
    """What caches lose on documents and in recall, in sentences; empty without both."""
    length, native = found.compared_length(POSITIONS), found.facts(NATIVE)
    base = found.loss(NATIVE, POSITIONS, length) if length else None
    if base is None or not native:
        return []
    parts = []
    for plan, words in (("int2", "caches of 2 bits"), ("window512", "windows of 512 tokens")):
        row, rows = found.loss(plan, POSITIONS, base.length), found.facts(plan)
        if row is not None and len(rows) == len(native):
            lost = f"{row.nll - base.nll:.3f} nats per token on documents"
            parts.append(f"{words} cost {lost} and leave {_recall(rows)}")
    if not parts:
        return []
    return [
        f"In texts of {found.long[0]:,} to {found.long[-1]:,} tokens, the native model answers "
        f"{_recall(native)} of the questions about facts (a guess: "
        f"{percent(native[0].chance, 0)}); {'; '.join(parts)}."
    ]


def _recall(rows: Sequence[TaskRow]) -> str:
    right = [value for row in rows for value in row.right]
    return percent(sum(right) / len(right), 0)


def share_words(right: Sequence[int]) -> str:
    """Format a share of right answers with its interval, in per cent."""
    if not right:
        return "-"
    share = sum(right) / len(right)
    low, high = wilson_interval(share, len(right))
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def long_context_document(found: Curves) -> list[TitledTable]:
    """All tables that there are records for."""
    tables: list[tuple[str, str, str, Table]] = []
    if found.tasks:
        chance = percent(found.tasks[0].chance, 0)
        lengths = ", ".join(f"{length:,}" for length in found.long)
        batch = found.tasks[0].batch_size
        caption = SUMMARY_CAPTION.format(
            batch=batch, middle=f"{found.middle:,}", lengths=lengths, chance=chance
        )
        tables.append(("summary", "Loss and recall", caption, summary_table(found)))
        for kind in found.kinds:
            asked = sorted({row.questions for row in found.tasks if row.kind == kind})
            caption = KIND_CAPTION.format(chance=chance, questions=_span(asked))
            tables.append((kind, title_of(kind), caption, kind_table(found, kind)))
        for length in found.long:
            caption = DEPTH_CAPTION.format(length=f"{length:,}")
            title = f"Recall by place, {length:,} tokens"
            tables.append((f"depth_{length}", title, caption, depth_table(found, length)))
    for length in found.lengths(POSITIONS):
        native = found.loss(NATIVE, POSITIONS, length)
        documents = counted(len(native.values) if native else 0, "document")
        caption = POSITION_CAPTION.format(length=f"{length:,}", documents=documents)
        title = f"Loss by position, {length:,} tokens"
        tables.append((f"positions_{length}", title, caption, position_table(found, length)))
    if found.lengths(ANSWERS):
        tables.append((ANSWERS, "Loss of answers", ANSWER_CAPTION, answer_table(found)))
    return [
        TitledTable(table, title, caption, name, by_method=False)
        for name, title, caption, table in tables
    ]


def long_context_markdown(found: Curves) -> str:
    """All tables with captions in Markdown, below a title."""
    return f"# Long contexts\n\n{document(long_context_document(found), captions=True)}"


def publish(folder: Path, found: Curves) -> None:
    """Write ``tables.md`` into a run folder, and print the tables."""
    shown = terminal(long_context_document(found))
    publish_tables(folder, long_context_markdown(found), shown)


def _delta(found: Curves, plan: str, measure: str, length: int | None) -> str:
    """The difference of a loss to that of the native plan, with its interval over documents."""
    if length is None:
        return "-"
    row, native = (found.loss(name, measure, length) for name in (plan, NATIVE))
    if row is None or native is None:
        return "-"
    if plan == NATIVE:
        return "0"
    sizes = [high - low for low, high in row.buckets]
    one, base = (np.average(r.values, axis=1, weights=sizes) for r in (row, native))
    difference = paired_difference(one, base)
    return signed(difference)


def _span(counts: Iterable[int]) -> str:
    low, *_, high = [*counts] * 2
    return str(low) if low == high else f"{low} to {high}"


def _first_number(place: str) -> int:
    return int(place.split()[1].split("-")[0])

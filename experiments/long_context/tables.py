"""Tables of results over the length of the context, and what they say in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.long_context.rows import ANSWERS, NATIVE, POSITIONS, Curves, TaskRow, share_of
from experiments.study.statistics import paired_difference
from experiments.study.tables import Table, TitledTable, counted, crossed_table, percent, signed

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
TITLES = {
    "recall": "Recall",
    "multikey": "Recall of one of several keys",
    "multivalue": "Recall of several values",
    "tracking": "Tracking of chains",
    "counting": "Most common words",
}


def _summary_table(data: Curves) -> Table:
    """Plans as lines: bytes, losses and recall."""
    losses = [name for name in (POSITIONS, ANSWERS) if data.lengths(name)]
    middle = data.long[len(data.long) // 2]
    header = ["Plan", f"Bytes, {middle:,}", *(_LOSSES[name] for name in losses), "Recall"]
    lines = []
    for plan in data.plans:
        rows = [row for row in data.tasks if (row.plan, row.length) == (plan, middle)]
        share = rows[0].peak_bytes / rows[0].native_peak_bytes if rows else None
        deltas = [_delta(data, plan, name, data.compared_length(name)) for name in losses]
        lines.append([plan, percent(share, 0), *deltas, _share(data.facts(plan))])
    return header, lines


def _kind_table(data: Curves, kind: str) -> Table:
    """Plans as lines, lengths as columns: the accuracy on one kind of task."""
    lengths = {f"{length:,}": length for length in data.lengths(kind)}
    rows = {(row.plan, row.length): row for row in data.tasks if row.measure == kind}

    def entry(plan: str, length: int) -> str:
        return _share([rows[plan, length]] if (plan, length) in rows else [])

    return crossed_table("Plan", {plan: plan for plan in data.plans}, lengths, entry)


def _place_table(data: Curves, length: int) -> Table:
    """Plans as lines, places of the fact as columns: the accuracy at one length."""
    places = {place for row in data.facts(NATIVE, length) for place in row.kinds}
    ordered = sorted(places, key=lambda place: int(place.split()[1].split("-")[0]))

    def entry(plan: str, place: str) -> str:
        return _share(data.facts(plan, length), place)

    columns = {place: place for place in ordered}
    return crossed_table("Plan", {plan: plan for plan in data.plans}, columns, entry)


def _position_table(data: Curves, length: int) -> Table:
    """Plans as lines, positions as columns: NLL of the native model, and differences to it."""
    native = data.loss(NATIVE, POSITIONS, length)
    assert native is not None
    header = ["Plan", *(f"{low:,}-{high:,}" for low, high in native.buckets)]
    lines = [[f"{NATIVE} (NLL)", *(f"{value:.3f}" for value in native.by_bucket)]]
    for plan in data.plans:
        row = data.loss(plan, POSITIONS, length)
        if row is not None and plan != NATIVE:
            pairs = zip(row.by_bucket, native.by_bucket, strict=True)
            lines.append([plan, *(f"{value - base:+.3f}" for value, base in pairs)])
    return header, lines


def _answer_table(data: Curves) -> Table:
    """Plans as lines, lengths as columns: the loss of answers."""
    lengths = data.lengths(ANSWERS)
    rows = [data.loss(NATIVE, ANSWERS, length) for length in lengths]
    lines = [[f"{NATIVE} (NLL)", *(f"{row.nll:.3f}" if row else "-" for row in rows)]]
    for plan in data.plans:
        if plan != NATIVE:
            lines.append([plan, *(_delta(data, plan, ANSWERS, length) for length in lengths)])
    return ["Plan", *(f"{length:,}" for length in lengths)], lines


def _share(rows: Sequence[TaskRow], place: str | None = None) -> str:
    """Format the share of right answers, at one place or all, with its interval in per cent."""
    right = [
        value
        for row in rows
        for value, kind in zip(row.right, row.kinds, strict=True)
        if place in (None, kind)
    ]
    if not right:
        return "-"
    share = share_of(right)
    return f"{100 * share.mean:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def long_context_findings(data: Curves) -> list[str]:
    """What caches lose on documents and in recall, in sentences; empty without both."""
    length, native = data.compared_length(POSITIONS), data.facts(NATIVE)
    base = data.loss(NATIVE, POSITIONS, length) if length else None
    if base is None or not native:
        return []
    parts = []
    for plan, words in (("int2", "caches of 2 bits"), ("window512", "windows of 512 tokens")):
        row, rows = data.loss(plan, POSITIONS, base.length), data.facts(plan)
        if row is not None and len(rows) == len(native):
            lost = f"{row.nll - base.nll:.3f} nats per token on documents"
            parts.append(f"{words} cost {lost} and leave {_recall(rows)}")
    if not parts:
        return []
    return [
        f"In texts of {data.long[0]:,} to {data.long[-1]:,} tokens, the native model answers "
        f"{_recall(native)} of the questions about facts (a guess: "
        f"{percent(native[0].chance, 0)}); {'; '.join(parts)}."
    ]


def _recall(rows: Sequence[TaskRow]) -> str:
    right = [value for row in rows for value in row.right]
    return percent(sum(right) / len(right), 0)


def long_context_tables(data: Curves) -> list[TitledTable]:
    """All tables that there are rows for."""
    tables: list[tuple[str, str, str, Table]] = []
    if data.tasks:
        chance = percent(data.tasks[0].chance, 0)
        caption = SUMMARY_CAPTION.format(
            batch=data.tasks[0].batch_size,
            middle=f"{data.long[len(data.long) // 2]:,}",
            lengths=", ".join(f"{length:,}" for length in data.long),
            chance=chance,
        )
        tables.append(("summary", "Loss and recall", caption, _summary_table(data)))
        for kind in data.kinds:
            asked = sorted({len(row.right) for row in data.tasks if row.measure == kind})
            questions = " to ".join(map(str, dict.fromkeys((asked[0], asked[-1]))))
            caption = KIND_CAPTION.format(chance=chance, questions=questions)
            tables.append((kind, TITLES[kind], caption, _kind_table(data, kind)))
        for length in data.long:
            caption = DEPTH_CAPTION.format(length=f"{length:,}")
            title = f"Recall by place, {length:,} tokens"
            tables.append((f"depth_{length}", title, caption, _place_table(data, length)))
    for length in data.lengths(POSITIONS):
        native = data.loss(NATIVE, POSITIONS, length)
        documents = counted(len(native.values) if native else 0, "document")
        caption = POSITION_CAPTION.format(length=f"{length:,}", documents=documents)
        title = f"Loss by position, {length:,} tokens"
        tables.append((f"positions_{length}", title, caption, _position_table(data, length)))
    if data.lengths(ANSWERS):
        tables.append((ANSWERS, "Loss of answers", ANSWER_CAPTION, _answer_table(data)))
    return [
        TitledTable(table, title, caption, name, by_method=False)
        for name, title, caption, table in tables
    ]


def _delta(data: Curves, plan: str, measure: str, length: int | None) -> str:
    """The difference of a loss to that of the native plan, with its interval over documents."""
    if length is None:
        return "-"
    row, native = (data.loss(name, measure, length) for name in (plan, NATIVE))
    if row is None or native is None:
        return "-"
    if plan == NATIVE:
        return "0"
    sizes = [high - low for low, high in row.buckets]
    values, base = (np.average(r.values, axis=1, weights=sizes) for r in (row, native))
    difference = paired_difference(values, base)
    return signed(difference)

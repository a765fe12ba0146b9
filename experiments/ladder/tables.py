"""Tables of all ladder programs, and the section on the ladder of a report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from experiments.ladder.figures import loss_against_bytes
from experiments.ladder.rows import Ladder, LadderRow, LlamaCppRow
from experiments.study.page import Gallery, Section
from experiments.study.records import LossRecord, Shape
from experiments.study.tables import (
    TIMES,
    Table,
    TitledTable,
    crossed_table,
    document,
    percent,
    shape_words,
)

UNIFORM_CAPTION = (
    "One level for all weights and one for all caches (embeddings with the head at int8 where "
    "weights are lowered). ΔNLL over unquantised weights and caches, nats per token with a 95 % "
    "interval over windows; MiB of weights and KV cache for each request (batch x tokens)."
)
POLICY_CAPTION = (
    "At each budget (share of the unquantised model's peak) the ΔNLL of removing blocks alone, and "
    "of a knapsack over the levels of all items. A dash: not measured; *: exceeds the budget."
)
LLAMA_CPP_CAPTION = (
    "llama.cpp on the same file and the same windows of token ids. MiB of weights and KV cache, "
    "and in brackets the resident memory of the process beyond what it had without a model."
)
SHIPPED_CAPTION = (
    "ΔNLL of one level for the weights of all blocks, for embeddings with the head, or for all "
    "caches, over the unquantised model, nats per token with a 95 % interval over windows. "
    "A file with four bits loses nothing at four; that says little about models shipped in more."
)
LADDER_ABSTRACT = [
    "A model can be fitted into a memory budget by storing its weights and its KV cache in fewer "
    "bits, by keeping fewer tokens in the cache, and by removing blocks. This report shows what "
    "each byte saved costs in quality, by uniform settings, by removal alone, and by a choice of "
    "a level for each item.",
]
"""The abstract of a report on the ladder."""

_ROUNDINGS = {"nearest": ", rounded to nearest", "calibrated": ", GPTQ on calibration text"}


def ladder_tables(data: Ladder) -> list[TitledTable]:
    """All tables there are rows for."""
    tables = []
    if data.settings:
        settings = {(r.name, r.shape): r for r in data.plans if r.method == "uniform"}
        labels = {name: data.label(name) for name in data.settings}
        table = _by_shape("Weights / caches", labels, settings)
        tables.append(("uniform", "Uniform settings", UNIFORM_CAPTION, table))
    if data.fractions:
        title = "Removal alone, and the ladder"
        tables.append(("policies", title, POLICY_CAPTION, _policy_table(data)))
    if data.llama_cpp:
        rows = {(row.cache, row.shape): row for row in data.llama_cpp}
        table = _by_shape("llama.cpp's cache", {cache: cache for cache, _ in rows}, rows)
        tables.append(("llama_cpp", "llama.cpp", LLAMA_CPP_CAPTION, table))
    if data.shipped:
        shipped = {(row.source, row.lowered): row for row in data.shipped}
        table = crossed_table(
            "Lowered everywhere",
            {f"{k[0]} {k[1]}{_ROUNDINGS.get(k[2], '')}": k for _, k in shipped},
            {f"{source[0]}, shipped in {source[1]}": source for source, _ in shipped},
            lambda lowered, source: (
                nats(shipped[source, lowered]) if (source, lowered) in shipped else "-"
            ),
        )
        tables.append(("shipped", "By how the model was shipped", SHIPPED_CAPTION, table))
    return [
        TitledTable(table, title, caption, name, by_method=False)
        for name, title, caption, table in tables
    ]


def ladder_markdown(data: Ladder) -> str:
    """All tables with captions in Markdown, below a title."""
    return f"# The ladder\n\n{document(ladder_tables(data), captions=True)}"


def _by_shape(
    corner: str, labels: dict[str, str], rows: Mapping[tuple[str, Shape], LadderRow | LlamaCppRow]
) -> Table:
    """ΔNLL of each setting, and its bytes for each request."""
    shapes = list(dict.fromkeys(shape for _, shape in rows))
    lines = []
    for name, label in labels.items():
        sizes = []
        for shape in shapes:
            row = rows[name, shape]
            resident = f" ({_mib(row.resident_bytes)})" if isinstance(row, LlamaCppRow) else ""
            sizes.append(f"{_mib(row.held_bytes)}{resident}")
        lines.append([label, nats(rows[name, shapes[0]]), *sizes])
    return [corner, "ΔNLL", *(f"{shape_words(shape)}, MiB" for shape in shapes)], lines


def _policy_table(data: Ladder) -> Table:
    lines = []
    for shape in data.shapes:
        for fraction in data.fractions:
            rows = [data.policy_row(name, shape, fraction) for name in ("removal", "knapsack")]
            measured = [row for row in rows if row]
            if measured:
                shown = [f"{nats(row)}{'' if row.fits else ' *'}" if row else "-" for row in rows]
                budget = _mib(measured[0].budget_bytes or 0)
                lines.append([shape_words(shape), percent(fraction, 0), budget, *shown])
    return ["Request", "Budget", "MiB", "Removal alone", "Knapsack over levels"], lines


def nats(row: LossRecord) -> str:
    """Format a ΔNLL with its interval, with four decimals where it is small."""
    digits = 4 if abs(row.loss) < 0.01 else 3
    return f"{row.loss:.{digits}f} [{row.loss_ci_low:.{digits}f}, {row.loss_ci_high:.{digits}f}]"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def ladder_section(data: Ladder, gallery: Gallery) -> Section:
    """Section of a report on the ladder: loss against bytes, and its tables."""
    section = Section("ladder", "Precision before removal")
    if data.plans:
        llama = (
            "Orange: llama.cpp on the same file and windows, by the format of its cache. "
            if data.llama_cpp
            else ""
        )
        gallery.add(
            section, "loss_against_bytes", "What each byte saved costs",
            f"A panel for each request (batch {TIMES} tokens). Grey squares are uniform settings "
            "(weights / caches; those that no other setting dominates are named). The red line "
            "removes blocks and nothing else, the teal one chooses a level for each item. "
            f"{llama}ΔNLL is over the unquantised model; its axis is linear up to 0.01.",
            partial(loss_against_bytes, data),
        )  # fmt: skip
    section.document(ladder_tables(data), {})
    return section


def ladder_findings(data: Ladder) -> list[str]:
    """The ladder's result in a sentence: removal and levels at the same budget."""
    for shape in reversed(data.shapes):
        for fraction in reversed(data.fractions):
            removal, levels = (
                data.policy_row(name, shape, fraction) for name in ("removal", "knapsack")
            )
            if removal and levels and levels.fits:
                return [
                    f"At {percent(fraction, 0)} of the unquantised peak of {shape_words(shape)} "
                    f"tokens, lowering precision first costs {levels.loss:.3f} nats per token; "
                    f"removing blocks alone costs {removal.loss:.2f}"
                    f"{'' if removal.fits else ' and does not fit'}."
                ]
    return []

"""Tables of the ladder in Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.ladder.records import LadderRow, LlamaCppRow, ShippedRow, shapes_of
from experiments.ladder.summaries import Ladder, LadderRecords
from experiments.study.tables import (
    Table,
    TitledTable,
    document,
    percent,
    publish_tables,
    shape_words,
    terminal,
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

_ROUNDINGS = {
    "nearest": ", rounded to nearest", "fitted": "", "calibrated": ", GPTQ on calibration text"
}  # fmt: skip


def uniform_table(found: Ladder) -> Table:
    """Settings as lines; ΔNLL and bytes for each request as columns."""
    header = ["Weights / caches", "ΔNLL", *(f"{shape_words(s)}, MiB" for s in found.shapes)]
    by_place = {(row.name, row.shape): row for row in found.rows if row.method == "uniform"}
    lines = []
    for name in found.settings:
        rows = [by_place[name, shape] for shape in found.shapes]
        lines.append([found.label(name), nats(rows[0]), *(mib(row.held_bytes) for row in rows)])
    return header, lines


def policy_table(found: Ladder) -> Table:
    """Requests and budgets as lines; removal and knapsack as columns."""
    header = ["Request", "Budget", "MiB", "Removal alone", "Knapsack over levels"]
    lines = []
    for shape in found.shapes:
        for fraction in found.fractions():
            rows = [found.policy_row(name, shape, fraction) for name in ("removal", "knapsack")]
            known = [row for row in rows if row]
            if not known:
                continue
            shown = [f"{nats(row)}{'' if row.fits else ' *'}" if row else "-" for row in rows]
            budget = mib(known[0].budget_bytes or 0)
            lines.append([shape_words(shape), percent(fraction, 0), budget, *shown])
    return header, lines


def llama_cpp_table(rows: Sequence[LlamaCppRow]) -> Table:
    """Formats of llama.cpp's cache as lines; ΔNLL and bytes for each request as columns."""
    shapes = shapes_of(rows)
    header = ["llama.cpp's cache", "ΔNLL", *(f"{shape_words(s)}, MiB" for s in shapes)]
    by_place = {(row.cache, row.shape): row for row in rows}
    lines = []
    for cache in dict.fromkeys(row.cache for row in rows):
        own = [by_place[cache, shape] for shape in shapes]
        held = [f"{mib(row.held_bytes)} ({mib(row.resident_bytes)})" for row in own]
        lines.append([cache, nats(own[0]), *held])
    return header, lines


def shipped_table(rows: Sequence[ShippedRow]) -> Table:
    """Levels as lines, models as columns."""
    models = list(dict.fromkeys((row.model, row.shipped) for row in rows))
    header = ["Lowered everywhere", *(f"{name}, shipped in {how}" for name, how in models)]
    by_place = {(row.model, row.shipped, row.what, row.level, row.rounding): row for row in rows}
    lines = []
    for what, level, rounding in dict.fromkeys((r.what, r.level, r.rounding) for r in rows):
        own = [by_place.get((*model, what, level, rounding)) for model in models]
        how = _ROUNDINGS.get(rounding, "")
        lines.append([f"{what} {level}{how}", *(nats(row) if row else "-" for row in own)])
    return header, lines


def nats(row: LadderRow | LlamaCppRow | ShippedRow) -> str:
    """Format a ΔNLL with its interval, with four decimals where it is small."""
    digits = 4 if abs(row.loss) < 0.01 else 3
    return f"{row.loss:.{digits}f} [{row.loss_ci_low:.{digits}f}, {row.loss_ci_high:.{digits}f}]"


def mib(value: float) -> str:
    """Bytes in MiB, without the unit."""
    return f"{value / 2**20:,.0f}"


def ladder_document(found: LadderRecords) -> list[TitledTable]:
    """All tables there are records for."""
    ladder, llama, shipped = found.ladder, found.llama_cpp, found.shipped
    tables = []
    if ladder and ladder.settings:
        tables.append(("uniform", "Uniform settings", UNIFORM_CAPTION, uniform_table(ladder)))
    if ladder and ladder.fractions():
        title = "Removal alone, and the ladder"
        tables.append(("policies", title, POLICY_CAPTION, policy_table(ladder)))
    if llama:
        tables.append(("llama_cpp", "llama.cpp", LLAMA_CPP_CAPTION, llama_cpp_table(llama)))
    if shipped:
        title = "By how the model was shipped"
        tables.append(("shipped", title, SHIPPED_CAPTION, shipped_table(shipped)))
    return [
        TitledTable(table, title, caption, name, by_method=False)
        for name, title, caption, table in tables
    ]


def ladder_markdown(found: LadderRecords) -> str:
    """All tables with captions in Markdown, below a title."""
    return f"# The ladder\n\n{document(ladder_document(found), captions=True)}"


def ladder_terminal_text(found: LadderRecords) -> str:
    """All tables with captions for the terminal."""
    return terminal(ladder_document(found))


def publish(folder: Path, found: LadderRecords) -> None:
    """Write ``tables.md`` into a run folder, and print the tables."""
    publish_tables(folder, ladder_markdown(found), ladder_terminal_text(found))

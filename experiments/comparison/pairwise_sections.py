"""Parts of the report's comparison: one method against others, and cells beside the grid."""

from __future__ import annotations

from experiments.comparison import tables
from experiments.comparison.html import Section
from experiments.comparison.labels import TIMES, look, rank
from experiments.comparison.pairwise_tables import (
    COUNTS_CAPTION,
    HOLM_CAPTION,
    PART_CAPTIONS,
    PART_TITLES,
    difference_table,
)
from experiments.comparison.summaries import Comparison

INTERVAL_WORDS = (
    "Intervals are 95 % percentile bootstrap over held-out windows, drawn jointly for all methods, "
    "and over seeds where a method has several."
)


def add_verdicts(section: Section, comparison: Comparison, where: str = "") -> None:
    """A table of each learned method against all others."""
    shown = [s.method for s in comparison.summaries if s.method in comparison.learned]
    for method in shown:
        section.table(
            difference_table(comparison, method), method_names(comparison),
            title=f"{look(method).label} minus each other method{where}, paired over windows",
        )  # fmt: skip
    if shown:
        section.text(f"{COUNTS_CAPTION} {HOLM_CAPTION}")


def add_cells(section: Section, comparison: Comparison, folded: bool = True) -> None:
    """Losses and removed blocks at each budget, request by request."""
    named = method_names(comparison)
    for shape in comparison.shapes:
        title = f"{shape[0]} {TIMES} {shape[1]:,} tokens"
        section.table(tables.loss_table(comparison, shape), named,
                      title=f"Loss at each budget, {title}", folded=folded)  # fmt: skip
        section.table(tables.removed_table(comparison, shape), named, folded=True,
                      title=f"Blocks removed (attn + ffn) and peak memory, {title}")  # fmt: skip


def add_part(section: Section, comparison: Comparison, part: str) -> None:
    """Summary, verdicts and losses of cells beside the grid, if there are any."""
    other = comparison.other_part(part)
    if not other or not other.summaries:
        return
    section.table(tables.summary_table(other), method_names(other), title=PART_TITLES[part])
    section.text(PART_CAPTIONS[part])
    add_verdicts(section, other, f" ({PART_TITLES[part].lower()})")
    add_cells(section, other, folded=False)


def method_names(comparison: Comparison) -> dict[str, str]:
    """First cells of tables -> methods; a seed count may follow the label."""
    named = {look(method).label: method for method in sorted(comparison.methods, key=rank)}
    for summary in comparison.summaries:
        named[f"{look(summary.method).label} ({summary.loss.seeds})"] = summary.method
    return named

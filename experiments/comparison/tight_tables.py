"""Tables of a comparison whose budgets stand for losses of a uniform setting."""

from __future__ import annotations

from experiments.comparison.summaries import Comparison
from experiments.study.json_records import Cell
from experiments.study.looks import look
from experiments.study.statistics import paired_ratio
from experiments.study.table_format import Table, TitledTable, crossed_table, shape_words

RATIO_TO = ("uniform", "knapsack", "greedy_per_byte")
"""Methods by whose ΔNLL that of each other method is divided."""

TARGET_CAPTION = (
    "About 0.1: budgets at which the best uniform setting loses about 0.1 nats per token on the "
    "calibration text; likewise the others."
)

RATIO_CAPTION = (
    "Geometric mean over the cells of a column of ΔNLL divided by that of the other method at the "
    "same budget, with a 95 % interval, paired over windows; below 1 is better. A dash: some ΔNLL "
    "is not significantly above 0, so that there is no ratio."
)


def _tight_columns(comparison: Comparison) -> dict[str, list[Cell]]:
    """The cells of each request, of each loss that budgets stand for, and all cells."""
    columns = {
        shape_words(shape): [cell for cell in comparison.cells if cell[:2] == shape]
        for shape in comparison.shapes
    }
    if len(comparison.cells) > len(comparison.shapes):  # else each request has one target
        columns |= {f"about {target:g}": cells for target, cells in comparison.targets.items()}
    return {**{name: cells for name, cells in columns.items() if cells}, "All": comparison.cells}


def target_table(comparison: Comparison) -> Table:
    """Return mean ΔNLL by request, and by the ΔNLL that budgets stand for."""
    return crossed_table(
        "Method",
        comparison.lines,
        _tight_columns(comparison),
        lambda method, cells: f"{comparison.summary(method, cells).delta_nll.mean:.3f}",
    )


def ratio_table(comparison: Comparison, other: str) -> Table:
    """Return ΔNLL divided by that of another method, by request and by target."""

    def entry(method: str, cells: list[Cell]) -> str:
        first, second = (
            [comparison.window_delta_nlls(name, cell) for cell in cells] for name in (method, other)
        )
        ratio = paired_ratio(first, second)
        return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "-"

    lines = {name: method for name, method in comparison.lines.items() if method != other}
    return crossed_table("Method", lines, _tight_columns(comparison), entry)


def tight_document(comparison: Comparison) -> list[TitledTable]:
    """Return the tables of a comparison whose budgets stand for losses; empty for others."""
    if not comparison.targets or not comparison.summaries:
        return []
    title = "Mean ΔNLL (nats/token) by request and by tightness"
    tables = [TitledTable(target_table(comparison), title, TARGET_CAPTION)]
    for other in RATIO_TO:
        if other in comparison.methods:
            title = f"ΔNLL divided by that of {look(other).label}"
            tables.append(TitledTable(ratio_table(comparison, other), title, RATIO_CAPTION))
    return tables

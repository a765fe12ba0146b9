"""Tables and the figure of what stubs recover."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.repair.rows import RepairComparison, RepairRow, mean_delta_nll
from experiments.study.figures import panels, style
from experiments.study.looks import look
from experiments.study.records import Cell, Shape
from experiments.study.statistics import Estimate
from experiments.study.tables import (
    Table,
    TitledTable,
    mebibytes,
    number,
    percent,
    shape_words,
)
from rap_env.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARROW = " \N{RIGHTWARDS ARROW} "

_MIN_SPAN = 0.06  # of the memory axis, as a share of its values


def repair_tables(data: RepairComparison) -> list[TitledTable]:
    """Every table that there are rows for."""
    title, grid = "ΔNLL at each request and budget", _grid_caption(data)
    tables = [
        TitledTable(_summary_table(data), caption=_summary_caption(data), name="summary"),
        TitledTable(_grid_table(data), title, grid, name="grid", by_method=False),
        TitledTable(
            _accuracy_table(data), "Accuracy of each task, mean over the cells", name="accuracy"
        ),
    ]  # fmt: skip
    return [part for part in tables if part.table[1]]


def _summary_table(data: RepairComparison) -> Table:
    """One row per repair: mean ΔNLL and ratio on texts of fitted domains and on others."""
    header = ["Repair", "ΔNLL, fitted", "Ratio", "ΔNLL, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    lines = []
    for repair in data.repairs:
        line = [look(repair).label]
        for other in (False, True):
            rows = data.on(repair, other=other)
            delta_nll = mean_delta_nll(rows)
            line += [f"{delta_nll.mean:.3f}" if delta_nll else "-", _ratio(data.ratio(rows))]
        by_cell = {row.cell: row for row in data.of(repair)}
        means = [
            sum(row.accuracies.values()) / len(row.accuracies)
            for row in by_cell.values()
            if row.accuracies
        ]
        fitting = sum(row.peak_bytes <= row.budget_bytes for row in by_cell.values())
        line += [
            percent(sum(means) / len(means) if means else None),
            number(max(row.fit_tokens for row in by_cell.values())), f"{fitting}/{len(by_cell)}",
        ]  # fmt: skip
        lines.append(line)
    return header, lines


def _summary_caption(data: RepairComparison) -> str:
    windows = sum({row.text: len(row.window_losses) for row in data.rows}.values())
    cells, texts = counted(len(data.cells), "cell"), counted(len(data.texts), "text")
    return (
        f"Mean ΔNLL in nats/token over {cells} (a request at a budget) and {texts}. Fitted: "
        "held-out text of the domains that stubs "
        "were fitted on; other: texts of other domains. Ratio: mean ΔNLL divided by that without "
        "stubs; lower is better, 1 means no recovery. Intervals are 95 % percentile bootstrap over "
        f"{windows} windows of report text, resampled jointly for both values of a ratio. Tokens: "
        "tokens that stubs were fitted on. Fits: masks within their budget."
    )


def _grid_table(data: RepairComparison) -> Table:
    """One line per request and budget: ΔNLL of all repairs on each text, and removed blocks."""
    header = ["Request", "Budget", *[_text_label(data, text) for text in data.texts],
              "Blocks removed"]  # fmt: skip
    rows = []
    for cell in data.cells:
        deltas = [
            _chain([_row_delta(data.at(repair, cell, text)) for repair in data.repairs])
            for text in data.texts
        ]
        removed = _chain([_removed(_row_at(data, repair, cell)) for repair in data.repairs])
        rows.append([shape_words(cell), _budget(data, cell), *deltas, removed])
    return header, rows


def _grid_caption(data: RepairComparison) -> str:
    chain = _chain([look(repair).label for repair in data.repairs])
    return (
        f"ΔNLL in nats/token; each cell holds: {chain}. Removed blocks (attn+ffn) are in the same "
        "order, given once if equal. Each repair has its own mask, found by greedy search at the "
        f"same budget, stubs included."
    )


def _accuracy_table(data: RepairComparison) -> Table:
    """Mean accuracy of each task over the cells; no rows without tasks."""
    rows = [row for row in data.rows if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    dense = next((row.dense_accuracies for row in rows if row.dense_accuracies), None)
    lines = [["Dense model", *_accuracy_cells([dense], tasks)]] if dense else []
    for repair in data.repairs:
        cells = {row.cell: row.accuracies for row in rows if row.repair == repair}
        if cells:
            lines.append([look(repair).label, *_accuracy_cells(list(cells.values()), tasks)])
    return ["Repair", *tasks, "mean"], lines


def _ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; the reference itself is 1 without an interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _text_label(data: RepairComparison, text: str) -> str:
    """Name of a report text, marked if no stub was fitted on its domain."""
    return f"{text} (not fitted on)" if data.is_other(text) else text


def _accuracy_cells(cells: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    """Mean accuracy of each task, and over all tasks."""
    means = [sum(cell[task] for cell in cells) / len(cells) for task in tasks]
    return [percent(mean) for mean in [*means, sum(means) / len(means)]]


def _chain(parts: Sequence[str]) -> str:
    """The common value of all repairs, or else their values in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _budget(data: RepairComparison, cell: Cell) -> str:
    size = next(row.budget_bytes for row in data.rows if row.cell == cell)
    return f"{percent(cell[2], 0)} ({mebibytes(size)})"


def _row_delta(row: RepairRow | None) -> str:
    return f"{row.loss:.2f}" if row else "-"


def _row_at(data: RepairComparison, repair: str, cell: Cell) -> RepairRow | None:
    """The row on any text: the mask is the same on all texts."""
    rows = [data.at(repair, cell, text) for text in data.texts]
    return next((row for row in rows if row), None)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"


def delta_nll_against_peak(data: RepairComparison) -> Figure:
    """ΔNLL over peak bytes: a panel per report text and request, a colour per repair.

    Peaks differ more between requests than between budgets, so each request has its own x axis.
    """
    shapes = list(dict.fromkeys(cell[:2] for cell in data.cells))
    rows, columns = len(shapes), len(data.texts)
    with style():
        figure, axes = panels(rows, columns, height=2.1 + 0.8 / rows, sharex="row", sharey=True)
        places = itertools.product(shapes, data.texts)
        for place, (axis, (shape, text)) in enumerate(zip(axes, places, strict=True)):
            _draw_peaks(axis, data, text, shape)
            if place < columns:
                fitted = "not fitted on" if data.is_other(text) else "fitted domain"
                axis.set_title(f"{text}\n{fitted}", fontsize=9)
            if place + columns >= len(axes):
                axis.set_xlabel("peak memory (MiB)", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel(f"{shape_words(shape)} tokens", fontweight="bold")
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))  # shared by all axes
        figure.supylabel("ΔNLL (nats/token)", fontsize=9)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_peaks(axis: Axes, data: RepairComparison, text: str, shape: Shape) -> None:
    """Draw a line per repair over the budgets of one request; hollow marks exceed the budget."""
    from matplotlib.ticker import MaxNLocator

    for place, repair in enumerate(data.repairs):
        shown = look(repair)
        rows = [data.at(repair, cell, text) for cell in data.cells if cell[:2] == shape]
        known = [row for row in rows if row]
        points = [(row.peak_bytes / 2**20, row.loss) for row in known]
        axis.plot(
            *zip(*points, strict=True) if points else ([], []), color=shown.colour, marker="o",
            markersize=4.5, linewidth=1.4, label=shown.label, zorder=3 + place,
        )  # fmt: skip
        for point, row in zip(points, known, strict=True):
            if row.peak_bytes > row.budget_bytes:
                axis.plot(*point, "o", color=shown.colour, markersize=4.5, markerfacecolor="white",
                          zorder=9)  # fmt: skip
    low, high = axis.get_xlim()
    spare = max(0.0, _MIN_SPAN * high - (high - low)) / 2  # so that a few kB are not magnified
    axis.set_xlim(low - spare, high + spare)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))

"""The figure of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.comparison.run_records import Records
from experiments.comparison.summaries import Comparison
from experiments.config.common import Shape
from experiments.study.plotting import (
    Panel,
    draw_series,
    look,
    panel_figure,
    plain_log_ticks,
    save_png,
    short_label,
)
from experiments.study.table_format import shape_words
from rap_env.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def delta_nll_against_budget(comparison: Comparison) -> Figure:
    """Draw ΔNLL against budget, a panel for each request, all methods.

    Its axis is logarithmic if all means are positive and span a decade.
    """
    pairs = {(row.method, row.cell) for row in comparison.rows if row.method in comparison.compared}
    means = [float(np.mean(comparison.window_delta_nlls(*pair))) for pair in pairs]
    log = min(means) > 0 and max(means) > 10 * min(means)

    def draw(axis: Axes, shape: Shape) -> None:
        _draw_delta_nlls(axis, comparison, shape)
        budgets = [100 * budget for budget in comparison.budgets_of(shape)]
        axis.set_xlim(max(budgets) + 1, min(budgets) - 1)
        if log:
            axis.set_yscale("log")
            plain_log_ticks(axis.yaxis)

    x = "memory budget (% of the native peak)"
    y = f"ΔNLL (nats/token{', log scale' if log else ''})"
    parts = [
        Panel(partial(draw, shape=shape), f"{shape_words(shape)} tokens", x, y)
        for shape in comparison.shapes
    ]
    return panel_figure(parts, height=3.1, same_axes=True, sharey=True)


def _draw_delta_nlls(axis: Axes, comparison: Comparison, shape: Shape) -> None:
    """Draw the lines of all methods in one panel, the first method on top."""
    methods = comparison.compared
    for place, method in enumerate(methods):
        shown = look(method)
        cells = [(*shape, budget) for budget in comparison.budgets_of(shape)]
        points = [(cell, e) for cell in cells if (e := comparison.delta_nll_at(method, cell))]
        spread_percent = 0.35 if comparison.same_budgets else 0.0
        shift = spread_percent * (place - len(methods) / 2) / max(1, len(methods))
        x = [100 * cell[2] + shift for cell, _ in points]
        y = [e.mean for _, e in points]
        width, order = (2.0, 5 - place / 100) if shown.learned else (1.0, 3 - place / 100)
        draw_series(
            axis, x, y, [(e.low, e.high) for _, e in points], color=shown.colour, linewidth=width,
            zorder=order, elinewidth=0.8, linestyle="-" if shown.learned else (0, (4, 2)),
            label=short_label(method), marker=shown.marker, markersize=5 if shown.learned else 4,
        )  # fmt: skip
        missed = [
            (a, b)
            for a, b, (cell, _) in zip(x, y, points, strict=True)
            if not all(row.fits for row in comparison.at(method, cell))
        ]
        if missed:
            axis.plot(
                *zip(*missed, strict=True), shown.marker, color=shown.colour, zorder=order + 1,
                markerfacecolor="white", markersize=5,
            )  # fmt: skip
    if comparison.same_budgets:
        axis.set_xticks([100 * budget for budget in comparison.budgets])


def draw_figures(comparisons: Iterable[Records], folder: Path) -> None:
    """Draw the figure of each comparison with several budgets of a request, in a folder."""
    require_extra("plots", "Drawing figures")
    for records in comparisons:
        comparison = records.comparison
        if comparison and comparison.summaries and len(comparison.cells) > len(comparison.shapes):
            name = f"{records.name.replace('/', '-')}-delta_nll_against_budget.png"
            save_png(delta_nll_against_budget(comparison), folder / name)

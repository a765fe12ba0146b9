"""Figures of what stubs recover."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from experiments.repair.summaries import RepairComparison
from experiments.repair.tables import text_label
from experiments.study.figures import INK, panels, style
from experiments.study.looks import look
from experiments.study.tables import TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shape = tuple[int, int]
"""Batch size and sequence length in tokens."""

_TEXT_COLOURS = ("#2A78C2", "#159A74", "#8E4FA8", "#B5651D", "#4B6C8B", "#C8324B", "#7B9A2D")
_MIB = 2**20


_MIN_SPAN = 0.06  # of the memory axis, as a share of its values


def delta_nll_against_peak(found: RepairComparison, narrow: bool) -> Figure:
    """ΔNLL over peak bytes: a panel per report text and request, a colour per repair.

    Peaks differ more between requests than between budgets, so each request has its own x axis.
    """
    shapes = list(dict.fromkeys(cell[:2] for cell in found.cells))
    places: list[tuple[str, Shape]] = (
        [(text, shape) for text in found.texts for shape in shapes]
        if narrow
        else [(text, shape) for shape in shapes for text in found.texts]
    )
    columns = len(shapes) if narrow else len(found.texts)
    rows = len(places) // columns
    with style():
        figure, axes = panels(
            rows, columns, narrow=narrow, height=2.1 + 0.8 / rows,
            sharex="col" if narrow else "row", sharey=True,
        )  # fmt: skip
        for place, (axis, (text, shape)) in enumerate(zip(axes, places, strict=True)):
            _draw_peaks(axis, found, text, shape)
            fitted = "not fitted on" if found.is_other(text) else "fitted domain"
            names = (f"{text}\n{fitted}", f"{shape[0]} {TIMES} {shape[1]:,} tokens")
            row_name, column_name = names if narrow else names[::-1]
            if place < columns:
                axis.set_title(column_name, fontsize=9)
            if place + columns >= len(places):
                axis.set_xlabel("peak memory (MiB)", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel(row_name, fontweight="bold")
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))  # shared by all axes
        figure.supylabel("ΔNLL (nats/token)", fontsize=9)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center",
            ncols=2 if narrow else 4,
        )  # fmt: skip
    return figure


def ratio_against_tokens(found: RepairComparison, narrow: bool) -> Figure:
    """Ratio to no stubs over the number of fitting tokens, a line per report text."""
    with style():
        figure, axes = panels(1, 1, narrow=narrow, height=3.2 if narrow else 3.6)
        axis = axes[0]
        for text, colour in zip(found.texts, cycle(_TEXT_COLOURS), strict=False):
            _draw_ratios(axis, found, text, colour)
        axis.axhline(1.0, color=INK, linewidth=0.9, linestyle=":")
        axis.set_xscale("log")
        _token_ticks(axis, list(found.token_rows))
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_xlabel("tokens fitted on (log scale)")
        axis.set_ylabel("ΔNLL / ΔNLL without stubs")
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside lower center" if narrow else
            "outside right center", ncols=2 if narrow else 1,
        )  # fmt: skip
    return figure


def _draw_peaks(axis: Axes, found: RepairComparison, text: str, shape: Shape) -> None:
    """Draw a line per repair over the budgets of one request; hollow marks exceed the budget."""
    from matplotlib.ticker import MaxNLocator

    for place, repair in enumerate(found.repairs):
        shown = look(repair)
        rows = [found.at(repair, cell, text) for cell in found.cells if cell[:2] == shape]
        known = [row for row in rows if row]
        points = [(row.peak_bytes / _MIB, row.loss) for row in known]
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


def _draw_ratios(axis: Axes, found: RepairComparison, text: str, colour: str) -> None:
    """Draw one text's line with intervals; dashed if its domain was not fitted on."""
    by_count = {
        count: found.ratio([row for row in rows if row.text == text])
        for count, rows in found.token_rows.items()
    }
    points = [(count, ratio) for count, ratio in by_count.items() if ratio]
    means = [ratio.mean for _, ratio in points]
    spread = [
        [ratio.mean - ratio.low for _, ratio in points],
        [ratio.high - ratio.mean for _, ratio in points],
    ]
    axis.errorbar(
        [count for count, _ in points], means, yerr=spread, color=colour, marker="o",
        markersize=4.5, linewidth=1.6, elinewidth=0.8, capsize=2, label=text_label(found, text),
        linestyle=(0, (4, 2)) if found.is_other(text) else "-",
    )  # fmt: skip


def _token_ticks(axis: Axes, counts: list[int]) -> None:
    """Set ticks at the numbers of fitting tokens, in thousands or millions."""
    from matplotlib.ticker import NullLocator

    axis.set_xticks(counts, [_short_count(count) for count in counts])
    axis.xaxis.set_minor_locator(NullLocator())


def _short_count(count: int) -> str:
    if count >= 1_000_000:
        return f"{count / 1_000_000:.3g} M"
    return f"{count / 1000:.3g} k" if count >= 1000 else str(count)

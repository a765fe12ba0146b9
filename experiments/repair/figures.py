"""The figure of what stubs recover, and the section of a report."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from experiments.repair.rows import RepairComparison
from experiments.repair.tables import repair_tables
from experiments.study.figures import panels, style
from experiments.study.looks import look
from experiments.study.page import Gallery, Section
from experiments.study.records import Shape
from experiments.study.tables import TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPAIR_ABSTRACT = [
    "A model can fit a memory budget by removing attention and feed-forward (FFN) blocks. A stub "
    "is a small module in a removed block's place: a low-rank linear map and a mean, fitted once "
    "for any set of removed blocks. This report shows how much of the lost quality stubs recover "
    "at equal memory, with the bytes of the stubs counted.",
]

"""The abstract of a report on repair."""

_MIB = 2**20
_MIN_SPAN = 0.06  # of the memory axis, as a share of its values


def delta_nll_against_peak(data: RepairComparison, narrow: bool) -> Figure:
    """ΔNLL over peak bytes: a panel per report text and request, a colour per repair.

    Peaks differ more between requests than between budgets, so each request has its own x axis.
    """
    shapes = list(dict.fromkeys(cell[:2] for cell in data.cells))
    places: list[tuple[str, Shape]] = (
        [(text, shape) for text in data.texts for shape in shapes]
        if narrow
        else [(text, shape) for shape in shapes for text in data.texts]
    )
    columns = len(shapes) if narrow else len(data.texts)
    rows = len(places) // columns
    with style():
        figure, axes = panels(
            rows, columns, narrow=narrow, height=2.1 + 0.8 / rows,
            sharex="col" if narrow else "row", sharey=True,
        )  # fmt: skip
        for place, (axis, (text, shape)) in enumerate(zip(axes, places, strict=True)):
            _draw_peaks(axis, data, text, shape)
            fitted = "not fitted on" if data.is_other(text) else "fitted domain"
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


def _draw_peaks(axis: Axes, data: RepairComparison, text: str, shape: Shape) -> None:
    """Draw a line per repair over the budgets of one request; hollow marks exceed the budget."""
    from matplotlib.ticker import MaxNLocator

    for place, repair in enumerate(data.repairs):
        shown = look(repair)
        rows = [data.at(repair, cell, text) for cell in data.cells if cell[:2] == shape]
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


def repair_section(data: RepairComparison, gallery: Gallery) -> Section:
    """Section of a report on repair: ΔNLL at equal memory, and its tables."""
    section = Section("repair", "Repair")
    for part in repair_tables(data):
        if part.name == "grid":
            looks = "; ".join(f"{look(r).label}: {look(r).what}" for r in data.repairs)
            gallery.add(
                section, "repair_delta_nll_against_peak",
                "ΔNLL against peak memory, with and without stubs",
                f"Peak memory of each mask for its request (batch {TIMES} tokens), stubs included. "
                "A line joins the budgets of one request; hollow marks exceed their budget. "
                f"{looks}.",
                partial(delta_nll_against_peak, data),
            )  # fmt: skip
        section.document([part], {look(repair).label: repair for repair in data.repairs})
    return section

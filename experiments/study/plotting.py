"""Style, panels and series that all figures share.

A study gives the panels of a figure; colours of methods are those of `experiments.study.looks`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Draw = Callable[[], "Figure"]
"""Draws a figure."""

INK, FAINT, GRID = "#1F2328", "#6B7178", "#E6E4DE"

LINEAR_NATS = 0.01
"""ΔNLL up to which `scale_delta_nll` makes an axis linear, nats per token."""

WIDE_IN = 9.2

PNG_DPI = 160

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "rap",
}


@contextmanager
def style() -> Iterator[None]:
    """Set the style of all figures within the block."""
    import matplotlib as mpl

    with mpl.rc_context(cast(Any, _STYLE)):
        yield


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    Attributes:
        draw: Draws into the axes.
        title: Its title.
        x: Label of its horizontal axis.
        y: Label of its vertical axis.
    """

    draw: Callable[[Axes], object]
    title: str = ""
    x: str = ""
    y: str = ""


def panel_figure(
    parts: Sequence[Panel],
    *,
    columns: int = 3,
    height: float = 2.8,
    legend: int = 5,
    same_axes: bool = False,
    **options: Any,
) -> Figure:
    """Draw panels in rows, with one legend below all.

    Args:
        parts: The panels.
        columns: Panels in a row, at most.
        height: Height of a row in inches.
        legend: Columns of the legend of the first panel's series; 0 for none.
        same_axes: Whether only panels at the left and bottom edge have labels of axes.
        **options: As for `matplotlib.figure.Figure.subplots`, such as ``sharey``.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(parts))
    rows = -(-len(parts) // columns)
    with style():
        figure = Figure(figsize=(WIDE_IN, height * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        for place, (axis, part) in enumerate(zip(axes, parts, strict=False)):
            part.draw(axis)
            axis.set_title(part.title)
            if part.y and not (same_axes and place % columns):
                axis.set_ylabel(part.y)
            if part.x and not (same_axes and place + columns < len(parts)):
                axis.set_xlabel(part.x)
        for axis in axes[len(parts) :]:
            axis.set_visible(False)
        if legend:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=legend)
    return figure


def draw_series(
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None = None,
    **looks: Any,
) -> None:
    """Draw points joined by a line, with intervals if there are any.

    Args:
        axis: Where to draw.
        x: Horizontal places.
        y: Values.
        intervals: Lower and upper end of the interval of each value.
        **looks: As for `matplotlib.axes.Axes.errorbar`, such as ``color``, ``label``, ``marker``.
    """
    spread = None
    if intervals is not None:
        spread = [
            [value - low for value, (low, _) in zip(y, intervals, strict=True)],
            [high - value for value, (_, high) in zip(y, intervals, strict=True)],
        ]
    axis.errorbar(x, y, yerr=spread, **{"marker": "o", "markersize": 4, **looks})


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure into a PNG file."""
    with style(), atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=PNG_DPI)


def svg_uri(figure: Figure) -> str:
    """Return the figure as a ``data:`` URI, so that the page needs no other file."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plain_log_ticks(axis: Any, subs: Sequence[float] = (1, 2, 5), form: str = "g") -> None:
    """Format tick labels as plain numbers such as 0.5 or 20, whatever the scale.

    Args:
        axis: A horizontal or vertical axis.
        subs: Multiples of powers of ten that have a label on a logarithmic axis.
        form: Format of a label.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axis.set_minor_formatter(NullFormatter())


def scale_delta_nll(axis: Axes) -> None:
    """Scale the vertical axis for ΔNLL: linear up to `LINEAR_NATS`, then logarithmic."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_yscale("symlog", linthresh=LINEAR_NATS, linscale=0.5)
    axis.yaxis.set_major_locator(FixedLocator((0, 0.01, 0.1, 1, 10)))
    plain_log_ticks(axis.yaxis)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(0, color=FAINT, linewidth=0.7)

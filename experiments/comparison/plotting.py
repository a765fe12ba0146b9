"""Style and axes that all figures share.

Each figure has a wide form for pages and a narrow form for phones.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Draw = Callable[[bool], "Figure"]
"""Draws a figure; the argument selects the narrow form."""

INK, FAINT, GRID = "#1F2328", "#6B7178", "#E6E4DE"

WIDE_IN, NARROW_IN = 9.2, 4.2

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


def panels(
    rows: int, columns: int, *, narrow: bool, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a grid of panels, `height` inches per row, without pyplot's state."""
    from matplotlib.figure import Figure

    width = NARROW_IN if narrow else WIDE_IN
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.flat)


def svg_uri(figure: Figure) -> str:
    """Return the figure as a ``data:`` URI, so that the page needs no other file."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def delta_nll_scale(axis: Axes, means: list[float], which: str, label: bool = True) -> None:
    """Label an axis of ΔNLL; it is logarithmic if all means are positive and span a decade."""
    log = bool(means) and min(means) > 0 and max(means) > 10 * min(means)
    text = f"ΔNLL (nats/token{', log scale' if log else ''})"
    if which == "x":
        axis.set_xlabel(text if label else "")
    else:
        axis.set_ylabel(text if label else "")
    if log:
        (axis.set_xscale if which == "x" else axis.set_yscale)("log")
        plain_log_ticks(axis.xaxis if which == "x" else axis.yaxis)


def plain_log_ticks(axis: Any) -> None:
    """Format tick labels as plain numbers such as 0.5 or 20, whatever the scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

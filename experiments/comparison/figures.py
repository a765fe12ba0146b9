"""Figures from records. Each has a wide form for pages and a narrow one for phones."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from experiments.comparison.labels import (
    KIND_COLOURS,
    TIMES,
    look,
    short_label,
)
from experiments.comparison.summaries import REFERENCE, Comparison
from rap_env.memory_picture import draw_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[bool], "Figure"]
"""Draws a figure; the argument asks for the narrow form."""

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
    """The look of every figure, for the block only."""
    import matplotlib as mpl

    with mpl.rc_context(cast(Any, _STYLE)):
        yield


def panels(
    rows: int, columns: int, *, narrow: bool, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of one panel a place, `height` inches a row, without pyplot's global state."""
    from matplotlib.figure import Figure

    width = NARROW_IN if narrow else WIDE_IN
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.flat)


def svg_uri(figure: Figure) -> str:
    """The figure as a ``data:`` address that needs no file beside the page."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def overview(comparison: Comparison, narrow: bool) -> Figure:
    """Mean loss of each method over the whole grid, with its interval, and accuracy."""
    summaries = comparison.summaries[::-1]
    accuracy = any(s.accuracy is not None for s in summaries)
    parts = 2 if accuracy else 1
    rows, columns = (parts, 1) if narrow else (1, parts)
    height = 0.9 + 0.27 * len(summaries)
    with style():
        figure, axes = panels(rows, columns, narrow=narrow, height=height)
        for place, s in enumerate(summaries):
            shown = look(s.method)
            open_marker: dict[str, Any] = {"markerfacecolor": "white"} if not s.fits_all else {}
            loss = s.loss
            axes[0].errorbar(
                loss.mean, place, xerr=[[loss.mean - loss.low], [loss.high - loss.mean]],
                fmt=shown.marker, color=shown.colour, markersize=6, capsize=3, **open_marker,
            )  # fmt: skip
            if accuracy and s.accuracy is not None:
                axes[1].plot(
                    100 * s.accuracy, place, shown.marker, color=shown.colour, markersize=6,
                    **open_marker,
                )  # fmt: skip
        for axis in axes:
            _name_rows(axis, [s.method for s in summaries])
        loss_scale(axes[0], [s.loss.mean for s in summaries], "x")
        axes[0].set_title("Loss on held-out text")
        if accuracy:
            _draw_dense_accuracy(axes[1], comparison)
            axes[1].set_xlabel("mean accuracy of the tasks (%)")
            axes[1].set_title("Accuracy")
            if not narrow:
                axes[1].tick_params(labelleft=False)
    return figure


def loss_against_budget(comparison: Comparison, narrow: bool) -> Figure:
    """Loss over the budget, a panel for each request, all methods."""
    shapes = comparison.shapes
    columns = 1 if narrow else min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    with style():
        figure, axes = panels(
            rows, columns, narrow=narrow, height=2.6 if narrow else 3.1, sharey=True, sharex=True
        )
        for axis in axes[len(shapes) :]:
            axis.set_visible(False)
        means: list[float] = []
        for place, (axis, shape) in enumerate(zip(axes, shapes, strict=False)):
            means += _draw_losses(axis, comparison, shape)
            axis.set_title(f"{shape[0]} {TIMES} {shape[1]:,} tokens")
            axis.set_xlabel("memory budget (% of the dense peak)" if narrow or place >= (
                rows - 1) * columns else "")  # fmt: skip
        for place, axis in enumerate(axes[: len(shapes)]):
            loss_scale(axis, means, "y", label=place % columns == 0)
        _budget_axis(axes[0], comparison.budgets)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower center", ncols=2 if narrow else 5,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
    return figure


def memory_picture(profile: dict[str, Any], narrow: bool) -> Figure:
    """Shares of what the dense model holds as the sequences get longer, a panel a batch size."""
    with style():
        return draw_memory(
            profile["memory_shares"],
            columns=2 if narrow else None,
            width_in=NARROW_IN if narrow else WIDE_IN,
            row_height_in=2.4 if narrow else 2.9,
        )


def importance_bars(profile: dict[str, Any], narrow: bool) -> Figure:
    """Left: loss without each block alone. Right: loss as GSI removes block after block."""
    gsi = profile.get("gsi")
    parts = 2 if gsi else 1
    with style():
        figure, axes = panels(
            parts if narrow else 1, 1 if narrow else parts, narrow=narrow, height=2.9
        )
        _draw_one_shot(axes[0], profile["one_shot"]["loss_rise"])
        if gsi:
            _draw_gsi(axes[1], gsi["order"], np.array(gsi["nll_after"]) - profile["dense_nll"])
    return figure


def _draw_one_shot(axis: Axes, loss_rise: list[float]) -> None:
    values = np.array(loss_rise)
    layers = np.arange(len(values) // 2)
    for kind, offset in (("attn", -0.21), ("ffn", 0.21)):
        heights = values[0::2] if kind == "attn" else values[1::2]
        axis.bar(layers + offset, heights, 0.42, color=KIND_COLOURS[kind], label=f"{kind} block")
    linear = max(0.01, float(np.median(np.abs(values))))
    axis.set_yscale("symlog", linthresh=linear)
    plain_log_ticks(axis.yaxis)
    axis.set_title("One block removed from the dense model")
    axis.set_xlabel("layer")
    axis.set_ylabel("loss (nats/token, log scale)")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", ncols=2)


def _draw_gsi(axis: Axes, order: list[str], losses: Any) -> None:
    kinds = [name.rpartition(".")[2] for name in order]
    places = np.arange(1, len(order) + 1)
    axis.bar(places, losses, 0.8, color=[KIND_COLOURS[kind] for kind in kinds])
    axis.set_title("GSI: blocks removed one after another")
    axis.set_xlabel("number of removed blocks")
    axis.set_ylabel("loss (nats/token)")
    axis.grid(axis="x", visible=False)
    axis.set_xlim(0.3, len(order) + 0.7)
    share = 100 * kinds.count("attn") / max(1, len(kinds))
    axis.text(
        0.03, 0.94, f"{share:.0f} % of the removed blocks\nare attention blocks",
        transform=axis.transAxes, va="top", color=FAINT, fontsize=8,
    )  # fmt: skip


def _draw_losses(axis: Axes, comparison: Comparison, shape: tuple[int, int]) -> list[float]:
    """Lines of all methods in one panel; returns the means drawn."""
    means = []
    methods = [m for m in comparison.methods[::-1] if m != REFERENCE]
    for place, method in enumerate(methods):
        shown = look(method)
        cells = [(*shape, b) for b in comparison.budgets if comparison.at(method, (*shape, b))]
        estimates = [comparison.loss_at(method, cell) for cell in cells]
        points = [(c, e) for c, e in zip(cells, estimates, strict=True) if e is not None]
        shift = 0.35 * (place - len(methods) / 2) / max(1, len(methods))
        x = [100 * cell[2] + shift for cell, _ in points]
        y = [e.mean for _, e in points]
        spread = [[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]]
        fits = [all(row.fits for row in comparison.at(method, cell)) for cell, _ in points]
        width, order = (2.0, 5) if shown.learned else (1.0, 3)
        axis.errorbar(
            x, y, yerr=spread, color=shown.colour, linewidth=width, zorder=order, elinewidth=0.8,
            linestyle="-" if shown.learned else (0, (4, 2)), label=short_label(method),
            marker=shown.marker, markersize=5 if shown.learned else 4,
        )  # fmt: skip
        missed = [(a, b) for a, b, ok in zip(x, y, fits, strict=True) if not ok]
        if missed:
            axis.plot(
                *zip(*missed, strict=True), shown.marker, color=shown.colour, zorder=order + 1,
                markerfacecolor="white", markersize=5,
            )  # fmt: skip
        means += y
    axis.set_xticks([100 * budget for budget in comparison.budgets])
    return means


def _budget_axis(axis: Axes, budgets: list[float]) -> None:
    """Tighter budgets to the right; around a single one there is room, so its marks stay close."""
    if len(budgets) == 1:
        axis.set_xlim(100 * budgets[0] + 1, 100 * budgets[0] - 1)
    else:
        axis.invert_xaxis()


def _draw_dense_accuracy(axis: Axes, comparison: Comparison) -> None:
    dense = [row.mean_accuracy for row in comparison.rows if row.method == REFERENCE]
    known = [value for value in dense if value is not None]
    if known:
        axis.axvline(100 * float(np.mean(known)), color=INK, linewidth=0.9, linestyle=":")
        axis.annotate(
            "dense", (100 * float(np.mean(known)), 1), xycoords=("data", "axes fraction"),
            xytext=(-3, -2), textcoords="offset points", ha="right", va="top", fontsize=8,
        )  # fmt: skip


def loss_scale(axis: Axes, means: list[float], which: str, label: bool = True) -> None:
    """A log axis where losses span more than a decade and none is at or below zero."""
    log = bool(means) and min(means) > 0 and max(means) > 10 * min(means)
    text = f"loss (nats/token{', log scale' if log else ''})"
    if which == "x":
        axis.set_xlabel(text if label else "")
    else:
        axis.set_ylabel(text if label else "")
    if log:
        (axis.set_xscale if which == "x" else axis.set_yscale)("log")
        plain_log_ticks(axis.xaxis if which == "x" else axis.yaxis)


def plain_log_ticks(axis: Any) -> None:
    """Numbers such as 0.5 or 20 at the ticks of an x or y axis, whatever its scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_rows(axis: Axes, methods: list[str]) -> None:
    axis.set_yticks(range(len(methods)), [short_label(method) for method in methods])
    axis.set_ylim(-0.6, len(methods) - 0.4)
    axis.grid(axis="y", visible=False)

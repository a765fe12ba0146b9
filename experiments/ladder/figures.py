"""The Pareto figure of the ladder: loss against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from experiments.ladder.rows import Ladder, LadderRow, LlamaCppRow
from experiments.study.figures import FAINT, INK, Panel, panel_figure
from experiments.study.records import Shape
from experiments.study.tables import shape_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REMOVAL, KNAPSACK, UNIFORM, LLAMA = "#C8324B", "#00707F", "#6B7178", "#E0812F"
_MIB = 2**20
_LINEAR = 0.01  # nats per token up to which the axis of ΔNLL is linear
_TICKS = (0, 0.01, 0.1, 1, 10)
_LEAST_GAIN = 0.002  # nats per token
_HALO = 2.2  # points of white around labels

Point = tuple[float, float]
"""MiB and ΔNLL."""


def loss_against_bytes(data: Ladder, narrow: bool) -> Figure:
    """ΔNLL over bytes of weights and cache, a panel for each request, everything labelled."""
    parts = [
        Panel(
            partial(_draw_request, data, shape),
            f"{shape_words(shape)} tokens",
            "weights and KV cache (MiB, log scale)",
            "ΔNLL (nats/token)",
        )
        for shape in data.shapes
    ]
    return panel_figure(
        parts, narrow=narrow, columns=2, height=3.3, legend=0, same_axes=True, sharey=True
    )


def pareto(rows: Sequence[LadderRow]) -> list[LadderRow]:
    """Those rows than which no other row has fewer bytes and a lower loss, the largest first."""
    best: list[LadderRow] = []
    for row in sorted(rows, key=lambda row: (row.held_bytes, row.loss)):
        if not best or row.loss < best[-1].loss:
            best.append(row)
    return best[::-1]


def named(uniform: Sequence[LadderRow]) -> list[LadderRow]:
    """Settings that get a label: the unquantised one, and those of the front that clearly differ.

    A larger setting must lower the loss by a fifth, and by more than `_LEAST_GAIN`.
    """
    differing: list[LadderRow] = []
    for row in reversed(pareto(uniform)):
        if not differing or row.loss < 0.8 * differing[-1].loss - _LEAST_GAIN:
            differing.append(row)
    native = [r for r in uniform if not r.levels and not r.packed and r not in differing]
    return [*native, *reversed(differing)]


def _draw_request(data: Ladder, shape: Shape, axis: Axes) -> None:
    uniform = data.at("uniform", shape)
    native = [row for row in uniform if not row.levels and not row.packed]
    lines = (("removal", REMOVAL, "blocks removed"), ("knapsack", KNAPSACK, "knapsack over levels"))
    for method, colour, words in lines:
        rows = [row for row in data.at(method, shape) if row.fits]
        if rows:
            points = _points([*native, *rows])
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5,
                      linewidth=1.5, zorder=4)  # fmt: skip
            _label(axis, points[-1], words, colour, above=method == "removal", bold=True)
    axis.plot(*zip(*_points(uniform), strict=True), "s", color=UNIFORM, markersize=3.5, zorder=5)
    for row in named(uniform):
        unquantised = not row.levels and not row.packed
        _label(axis, _points([row])[0], data.label(row.name), INK, above=True, left=unquantised)
    labelled: LlamaCppRow | None = None
    for cached in sorted(data.llama_cpp, key=lambda row: row.held_bytes):
        if cached.shape != shape:
            continue
        (point,) = _points([cached])
        axis.plot(*point, "D", color=LLAMA, markersize=4, zorder=6)
        # Labels of points that nearly coincide would hide each other.
        if labelled is None or cached.loss < labelled.loss / 1.5:
            _label(axis, point, cached.cache, LLAMA, above=labelled is None)
            labelled = cached
    _scale(axis)


def _points(rows: Sequence[LadderRow] | Sequence[LlamaCppRow]) -> list[Point]:
    return [(row.held_bytes / _MIB, row.loss) for row in rows]


def _label(
    axis: Axes, point: Point, text: str, colour: str, *, above: bool, bold: bool = False,
    left: bool = False,
) -> None:  # fmt: skip
    """Write a label beside a point, readable on lines."""
    from matplotlib.patheffects import withStroke

    axis.annotate(
        text, point, xytext=(-4 if left else 4, 4 if above else -4),
        textcoords="offset points", ha="right" if left else "left",
        fontsize=7.5 if bold else 6.5, color=colour, fontweight="bold" if bold else "normal",
        va="bottom" if above else "top", zorder=8,
        path_effects=[withStroke(linewidth=_HALO, foreground="white")],
    )  # fmt: skip


def _scale(axis: Axes) -> None:
    """A logarithmic axis of bytes, and one of ΔNLL that is linear near zero."""
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        NullFormatter,
        NullLocator,
    )

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yscale("symlog", linthresh=_LINEAR, linscale=0.5)
    axis.yaxis.set_major_locator(FixedLocator(_TICKS))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(0, color=FAINT, linewidth=0.7)

"""Figures of results over the length of the context: recall, loss by position, loss of answers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from experiments.long_context.rows import ANSWERS, NATIVE, POSITIONS, Curves
from experiments.long_context.tables import TITLES
from experiments.study.figures import FAINT, Panel, draw_series, panel_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    "#1F2328", "#2F6DB5", "#C8324B", "#E0812F", "#8E4FA8",
    "#00707F", "#2FA52F", "#6B7178", "#8A5A2B", "#D64FA0",
)  # fmt: skip
_MARKERS = "osD^vPX"  # another number than of colours, so that no two plans look alike


def over_length(data: Curves, narrow: bool) -> Figure:
    """Accuracy over length for each kind of task, then ΔNLL by position and of answers."""
    of_length, rise = "length of the text (tokens)", "ΔNLL (nats/token)"
    parts = [
        Panel(partial(_draw_task, data, kind), TITLES[kind], of_length, "right (%)")
        for kind in data.kinds
    ]
    if data.lengths(POSITIONS):
        draw = partial(_draw_positions, data)
        parts.append(Panel(draw, "Loss on documents", "position (tokens)", rise))
    if data.lengths(ANSWERS):
        draw = partial(_draw_answers, data)
        parts.append(Panel(draw, "Loss of reference answers", of_length, rise))
    return panel_figure(parts, narrow=narrow, height=2.6)


def _draw_task(data: Curves, kind: str, axis: Axes) -> None:
    lengths = data.lengths(kind)
    for number, plan in enumerate(data.plans):
        rows = [row for length in lengths if (row := data.task(plan, kind, length))]
        shares = [row.share for row in rows]
        colour, marker = _look(number)
        places = [row.length * 1.02 ** (number - len(data.plans) / 2) for row in rows]
        draw_series(
            axis, places, [100 * share.mean for share in shares],
            [(100 * share.low, 100 * share.high) for share in shares],
            color=colour, marker=marker, linewidth=1.3, elinewidth=0.6, label=plan,
        )  # fmt: skip
    axis.axhline(100 * data.tasks[0].chance, color=FAINT, linestyle=":", linewidth=1)
    axis.set_ylim(0, 104)
    _length_axis(axis, lengths)


def _draw_positions(data: Curves, axis: Axes) -> None:
    length = data.compared_length(POSITIONS)
    assert length is not None
    native = data.loss(NATIVE, POSITIONS, length)
    for number, plan in enumerate(data.plans):
        row = data.loss(plan, POSITIONS, length)
        if row is None or native is None or plan == NATIVE:
            continue
        middles = [(low + high) / 2 for low, high in row.buckets]
        rises = [a - b for a, b in zip(row.by_bucket, native.by_bucket, strict=True)]
        colour, marker = _look(number)
        draw_series(axis, middles, rises, color=colour, marker=marker, linewidth=1.3)
    axis.axhline(0, color=FAINT, linewidth=0.7)


def _draw_answers(data: Curves, axis: Axes) -> None:
    lengths = data.lengths(ANSWERS)
    for number, plan in enumerate(data.plans):
        if plan == NATIVE:
            continue
        pairs = [
            (length, row.nll - base.nll)
            for length in lengths
            if (row := data.loss(plan, ANSWERS, length))
            and (base := data.loss(NATIVE, ANSWERS, length))
        ]
        colour, marker = _look(number)
        draw_series(axis, *zip(*pairs, strict=True), color=colour, marker=marker, linewidth=1.3)
    axis.axhline(0, color=FAINT, linewidth=0.7)
    _length_axis(axis, lengths)


def _length_axis(axis: Axes, lengths: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{length:,}" for length in lengths])


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a plan by its place."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]

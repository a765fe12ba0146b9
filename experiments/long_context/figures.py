"""Figures of results over the length of the context: recall, loss by position, loss of answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.long_context.records import ANSWERS, NATIVE, POSITIONS
from experiments.long_context.tables import Curves, title_of
from experiments.study.figures import FAINT, PNG_DPI, panels, style
from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    "#1F2328", "#2F6DB5", "#C8324B", "#E0812F", "#8E4FA8",
    "#00707F", "#2FA52F", "#6B7178", "#8A5A2B", "#D64FA0",
)  # fmt: skip
_MARKERS = "osD^vPX"  # another number than of colours, so that no two plans look alike


def save_figure(found: Curves, path: Path) -> None:
    """Draw `over_length` in its wide form into a PNG file."""
    figure = over_length(found, narrow=False)
    with style(), atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=PNG_DPI)


def over_length(found: Curves, narrow: bool) -> Figure:
    """Accuracy over length for each kind of task, then ΔNLL by position and of answers."""
    losses = [name for name in (POSITIONS, ANSWERS) if found.lengths(name)]
    count = len(found.kinds) + len(losses)
    columns = 1 if narrow else min(3, count)
    rows = -(-count // columns)
    with style():
        figure, axes = panels(rows, columns, narrow=narrow, height=2.6)
        for axis, kind in zip(axes, found.kinds, strict=False):
            _draw_task(axis, found, kind)
        for axis, name in zip(axes[len(found.kinds) :], losses, strict=False):
            (_draw_answers if name == ANSWERS else _draw_positions)(axis, found)
        for axis in axes[count:]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if narrow else 5, title="Plan"
        )
    return figure


def _draw_task(axis: Axes, found: Curves, kind: str) -> None:
    lengths = found.lengths(kind)
    for number, plan in enumerate(found.plans):
        rows = [row for length in lengths if (row := found.task(plan, kind, length))]
        shown = [100 * row.accuracy for row in rows]
        low = [100 * (row.accuracy - row.accuracy_ci_low) for row in rows]
        high = [100 * (row.accuracy_ci_high - row.accuracy) for row in rows]
        colour, marker = _look(number)
        places = [row.length * 1.02 ** (number - len(found.plans) / 2) for row in rows]
        axis.errorbar(
            places, shown, yerr=[low, high], color=colour, marker=marker, markersize=4,
            linewidth=1.3, elinewidth=0.6, label=plan,
        )  # fmt: skip
    chance = 100 * found.tasks[0].chance
    axis.axhline(chance, color=FAINT, linestyle=":", linewidth=1)
    axis.set_title(title_of(kind))
    axis.set_ylim(0, 104)
    axis.set_ylabel("right (%)")
    _length_axis(axis, lengths)


def _draw_positions(axis: Axes, found: Curves) -> None:
    length = found.compared_length(POSITIONS)
    assert length is not None
    native = found.loss(NATIVE, POSITIONS, length)
    for number, plan in enumerate(found.plans):
        row = found.loss(plan, POSITIONS, length)
        if row is None or native is None or plan == NATIVE:
            continue
        middles = [(low + high) / 2 for low, high in row.buckets]
        rises = [a - b for a, b in zip(row.by_bucket, native.by_bucket, strict=True)]
        colour, marker = _look(number)
        axis.plot(middles, rises, color=colour, marker=marker, markersize=4, linewidth=1.3)
    axis.axhline(0, color=FAINT, linewidth=0.7)
    axis.set_title("Loss on documents")
    axis.set_xlabel("position (tokens)")
    axis.set_ylabel("ΔNLL (nats/token)")


def _draw_answers(axis: Axes, found: Curves) -> None:
    lengths = found.lengths(ANSWERS)
    for number, plan in enumerate(found.plans):
        if plan == NATIVE:
            continue
        pairs = [
            (length, row.nll - base.nll)
            for length in lengths
            if (row := found.loss(plan, ANSWERS, length))
            and (base := found.loss(NATIVE, ANSWERS, length))
        ]
        colour, marker = _look(number)
        axis.plot(*zip(*pairs, strict=True), color=colour, marker=marker, markersize=4,
                  linewidth=1.3)  # fmt: skip
    axis.axhline(0, color=FAINT, linewidth=0.7)
    axis.set_title("Loss of reference answers")
    axis.set_ylabel("ΔNLL (nats/token)")
    _length_axis(axis, lengths)


def _length_axis(axis: Axes, lengths: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{length:,}" for length in lengths])
    axis.set_xlabel("length of the text (tokens)")


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a plan by its place."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]

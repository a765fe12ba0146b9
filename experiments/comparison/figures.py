"""Figures of a comparison, of importance and memory, and of trained policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.comparison.summaries import REFERENCE, Comparison
from experiments.comparison.training_runs import TrainingRun
from experiments.study.figures import (
    FAINT,
    INK,
    NARROW_IN,
    WIDE_IN,
    delta_nll_scale,
    panels,
    plain_log_ticks,
    style,
)
from experiments.study.looks import KIND_COLOURS, look, short_label
from experiments.study.records import Cell
from experiments.study.tables import shape_words
from rap_env.memory_picture import draw_memory
from rap_env.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(comparison: Comparison, narrow: bool) -> Figure:
    """Draw the mean ΔNLL of each method over the grid, with its interval, and accuracy."""
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
            loss = s.delta_nll
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
        delta_nll_scale(axes[0], [s.delta_nll.mean for s in summaries], "x")
        axes[0].set_title("ΔNLL on held-out text")
        if accuracy:
            _draw_dense_accuracy(axes[1], comparison)
            axes[1].set_xlabel("mean accuracy of the tasks (%)")
            axes[1].set_title("Accuracy")
            if not narrow:
                axes[1].tick_params(labelleft=False)
    return figure


def delta_nll_against_budget(comparison: Comparison, narrow: bool) -> Figure:
    """Draw ΔNLL against budget, a panel for each request, all methods."""
    shapes = comparison.shapes
    columns = 1 if narrow else min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    with style():
        figure, axes = panels(
            rows, columns, narrow=narrow, height=2.6 if narrow else 3.1, sharey=True,
            sharex=comparison.same_budgets,
        )  # fmt: skip
        for axis in axes[len(shapes) :]:
            axis.set_visible(False)
        means: list[float] = []
        peak = f"memory budget (% of the {comparison.reference_word} peak)"
        for place, (axis, shape) in enumerate(zip(axes, shapes, strict=False)):
            means += _draw_delta_nlls(axis, comparison, shape)
            axis.set_title(f"{shape_words(shape)} tokens")
            lowest = place + columns >= len(shapes)  # no panel below
            axis.set_xlabel(peak if narrow or lowest else "")
            if lowest:
                axis.tick_params(labelbottom=True)
        for place, axis in enumerate(axes[: len(shapes)]):
            delta_nll_scale(axis, means, "y", label=place % columns == 0)
        shown = zip(axes[:1] if comparison.same_budgets else axes, shapes, strict=False)
        for axis, shape in shown:
            _budget_axis(axis, comparison.budgets_of(shape))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower center", ncols=2 if narrow else 5,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
    return figure


def memory_picture(profile: dict[str, Any], narrow: bool) -> Figure:
    """Draw shares of the dense model's memory over sequence length, a panel per batch size."""
    with style():
        return draw_memory(
            profile["memory_shares"],
            columns=2 if narrow else None,
            width_in=NARROW_IN if narrow else WIDE_IN,
            row_height_in=2.4 if narrow else 2.9,
        )


def importance_bars(profile: dict[str, Any], narrow: bool) -> Figure:
    """Draw ΔNLL of removing each block alone, and of the blocks that GSI removes in turn."""
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


def _draw_one_shot(axis: Axes, delta_nll: list[float]) -> None:
    values = np.array(delta_nll)
    layers = np.arange(len(values) // 2)
    for kind, offset in (("attn", -0.21), ("ffn", 0.21)):
        heights = values[0::2] if kind == "attn" else values[1::2]
        axis.bar(layers + offset, heights, 0.42, color=KIND_COLOURS[kind], label=f"{kind} block")
    linear = max(0.01, float(np.median(np.abs(values))))
    axis.set_yscale("symlog", linthresh=linear)
    plain_log_ticks(axis.yaxis)
    axis.set_title("One block removed from the dense model")
    axis.set_xlabel("layer")
    axis.set_ylabel("ΔNLL (nats/token, log scale)")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", ncols=2)


def _draw_gsi(axis: Axes, order: list[str], losses: Any) -> None:
    kinds = [name.rpartition(".")[2] for name in order]
    places = np.arange(1, len(order) + 1)
    axis.bar(places, losses, 0.8, color=[KIND_COLOURS[kind] for kind in kinds])
    axis.set_title("GSI: blocks removed in turn")
    axis.set_xlabel("number of removed blocks")
    axis.set_ylabel("ΔNLL (nats/token)")
    axis.grid(axis="x", visible=False)
    axis.set_xlim(0.3, len(order) + 0.7)
    share = 100 * kinds.count("attn") / max(1, len(kinds))
    axis.text(
        0.03, 0.94, f"{share:.0f} % of the removed blocks\nare attention blocks",
        transform=axis.transAxes, va="top", color=FAINT, fontsize=8,
    )  # fmt: skip


def _draw_delta_nlls(axis: Axes, comparison: Comparison, shape: tuple[int, int]) -> list[float]:
    """Draw the lines of all methods in one panel; return the drawn means."""
    means = []
    methods = [m for m in comparison.methods[::-1] if m != REFERENCE]
    for place, method in enumerate(methods):
        shown = look(method)
        every = [(*shape, budget) for budget in comparison.budgets_of(shape)]
        cells = [cell for cell in every if comparison.at(method, cell)]
        estimates = [comparison.delta_nll_at(method, cell) for cell in cells]
        points = [(c, e) for c, e in zip(cells, estimates, strict=True) if e is not None]
        spread_percent = 0.35 if comparison.same_budgets else 0.0
        shift = spread_percent * (place - len(methods) / 2) / max(1, len(methods))
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
    if comparison.same_budgets:
        axis.set_xticks([100 * budget for budget in comparison.budgets])
    return means


def _budget_axis(axis: Axes, budgets: list[float]) -> None:
    """Order budgets from large to small; a single budget gets a fixed range around it."""
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


def _name_rows(axis: Axes, methods: list[str]) -> None:
    axis.set_yticks(range(len(methods)), [short_label(method) for method in methods])
    axis.set_ylim(-0.6, len(methods) - 0.4)
    axis.grid(axis="y", visible=False)


CURVES = (
    ("episode/loss", "ΔNLL at the end of the episode\n(calibration text, nats/token)"),
    ("episode/return", "return of the episode"),
)
"""Metrics drawn as learning curves, with axis labels."""

Removal = tuple[Cell, list[str]]
"""A cell, and the names of the blocks that a mask removes there."""

SMOOTHED_EPISODES = 50
"""Number of episodes that each point of a learning curve averages."""


def removal_picture(removed: Sequence[Removal], num_layers: int, narrow: bool) -> Figure:
    """Draw which blocks a method removes: a line for each cell, a column for each layer.

    Args:
        removed: Cells and masks of one method; several seeds are averaged.
        num_layers: Number of the model's layers.
        narrow: Whether the attn panel is above the ffn panel instead of to its left.
    """
    cells = sorted(
        {cell for cell, _ in removed}, key=lambda cell: (cell[0] * cell[1], cell[0], -cell[2])
    )
    shares = np.array([_removed_share(removed, cell, num_layers) for cell in cells])
    with style():
        shape = (2, 1) if narrow else (1, 2)
        figure, axes = panels(*shape, narrow=narrow, height=1.0 + 0.21 * len(cells), sharey=True)
        for axis, kind in zip(axes, ("attn", "ffn"), strict=True):
            part = shares[:, 0::2] if kind == "attn" else shares[:, 1::2]
            _draw_shares(axis, part, kind)
            axis.set_xlabel("layer")
            _separate_requests(axis, cells)
        axes[0].set_title("Attention blocks removed")
        axes[1].set_title("FFN blocks removed")
    return figure


def logged_curves(runs: Sequence[TrainingRun]) -> list[tuple[str, str]]:
    """Return those of `CURVES` that some run has logged."""
    return [(name, label) for name, label in CURVES if any(run.series(name)[0] for run in runs)]


def learning_curves(runs: Sequence[TrainingRun], narrow: bool) -> Figure:
    """Draw the logged learning curves: thin for each seed, thick for the mean."""
    drawn = logged_curves(runs)
    shape = (len(drawn), 1) if narrow else (1, len(drawn))
    with style():
        figure, axes = panels(*shape, narrow=narrow, height=2.8)
        for axis, (name, label) in zip(axes, drawn, strict=True):
            for method in sorted({run.method for run in runs}):
                series = [_smooth(*run.series(name)) for run in runs if run.method == method]
                _draw_curves(axis, method, [(s, v) for s, v in series if s])
            axis.set_xlabel("training step (one action each)")
            axis.set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if narrow else 4)
    return figure


def _smooth(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return moving averages over `SMOOTHED_EPISODES` episodes."""
    width = min(SMOOTHED_EPISODES, max(1, len(values) // 4))
    if not values:
        return [], []
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return steps[width - 1 :], means.tolist()


def _draw_curves(axis: Axes, method: str, series: Sequence[tuple[list[int], list[float]]]) -> None:
    shown = look(method)
    if not series:
        return
    label = f"{short_label(method)} ({len(series)} seed{'s' if len(series) > 1 else ''})"
    if len(series) == 1:
        axis.plot(*series[0], color=shown.colour, linewidth=1.8, label=label)
        return
    for steps, values in series:
        axis.plot(steps, values, color=shown.colour, linewidth=0.7, alpha=0.45)
    last = min(steps[-1] for steps, _ in series)  # the mean covers the steps that all seeds reached
    grid = np.linspace(max(steps[0] for steps, _ in series), last, 200)
    mean = np.mean([np.interp(grid, steps, values) for steps, values in series], axis=0)
    axis.plot(grid, mean, color=shown.colour, linewidth=2.2, label=label)


def _removed_share(
    removed: Sequence[Removal], cell: Cell, num_layers: int
) -> npt.NDArray[np.float64]:
    """Return the share of the masks at a cell that remove each block, shape (2L,)."""
    masks = [mask for place, mask in removed if place == cell]
    share = np.zeros(2 * num_layers)
    for mask in masks:
        share[sorted(Plan.removing(*mask).removed)] += 1 / len(masks)
    return share


def _draw_shares(axis: Axes, shares: npt.NDArray[np.float64], kind: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(kind, ["#F5F4F0", KIND_COLOURS[kind]])
    axis.pcolormesh(
        shares, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.8,
        rasterized=False, shading="flat",
    )  # fmt: skip
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    layers = shares.shape[1]
    every = 5 if layers > 12 else 1
    axis.set_xticks(
        np.arange(0, layers, every) + 0.5, [str(layer) for layer in range(0, layers, every)]
    )
    axis.set_ylim(len(shares), 0)  # the first request on top; panels share this axis


def _separate_requests(axis: Axes, cells: Sequence[Cell]) -> None:
    axis.set_yticks(
        np.arange(len(cells)) + 0.5,
        [f"{shape_words(cell)}  {100 * cell[2]:.0f} %" for cell in cells],
    )
    for place in range(1, len(cells)):
        if cells[place][:2] != cells[place - 1][:2]:
            axis.axhline(place, color=FAINT, linewidth=0.8)

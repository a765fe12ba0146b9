"""Figures of a comparison, of memory, of chosen levels and of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.comparison.summaries import Comparison
from experiments.comparison.training_runs import TrainingRun
from experiments.study.figures import (
    FAINT,
    INK,
    Panel,
    delta_nll_scale,
    draw_series,
    panel_figure,
    panels,
    style,
)
from experiments.study.looks import LEVEL_COLOURS, look, short_label
from experiments.study.records import Shape
from experiments.study.tables import shape_words
from rap_env.blocks import block_name
from rap_env.plan import EMBEDDINGS, cache_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def delta_nll_against_budget(comparison: Comparison) -> Figure:
    """Draw ΔNLL against budget, a panel for each request, all methods."""
    shapes, same = comparison.shapes, comparison.same_budgets
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    with style():
        figure, axes = panels(rows, columns, height=3.1, sharey=True, sharex=same)
        means: list[float] = []
        peak = f"memory budget (% of the {comparison.reference_word} peak)"
        for place, (axis, shape) in enumerate(zip(axes, shapes, strict=False)):
            means += _draw_delta_nlls(axis, comparison, shape)
            axis.set_title(f"{shape_words(shape)} tokens")
            lowest = place + columns >= len(shapes)  # no panel below
            axis.set_xlabel(peak if lowest else "")
            if lowest:
                axis.tick_params(labelbottom=True)
        for place, axis in enumerate(axes):
            axis.set_visible(place < len(shapes))
            delta_nll_scale(axis, means, "y", label=place % columns == 0)
        for axis, shape in zip(axes[:1] if same else axes, shapes, strict=False):
            budgets = [100 * budget for budget in comparison.budgets_of(shape)]
            if len(budgets) == 1:
                axis.set_xlim(budgets[0] + 1, budgets[0] - 1)
            else:
                axis.invert_xaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower center", ncols=5,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
    return figure


def _draw_delta_nlls(axis: Axes, comparison: Comparison, shape: Shape) -> list[float]:
    """Draw the lines of all methods in one panel; return the drawn means."""
    means = []
    methods = comparison.compared[::-1]
    for place, method in enumerate(methods):
        shown = look(method)
        cells = [(*shape, budget) for budget in comparison.budgets_of(shape)]
        points = [(cell, e) for cell in cells if (e := comparison.delta_nll_at(method, cell))]
        spread_percent = 0.35 if comparison.same_budgets else 0.0
        shift = spread_percent * (place - len(methods) / 2) / max(1, len(methods))
        x = [100 * cell[2] + shift for cell, _ in points]
        y = [e.mean for _, e in points]
        width, order = (2.0, 5) if shown.learned else (1.0, 3)
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
        means += y
    if comparison.same_budgets:
        axis.set_xticks([100 * budget for budget in comparison.budgets])
    return means


MEMORY_PARTS = {
    "ffn_weights": ("FFN weights", "#E0812F"),
    "attn_weights": ("attention weights", "#2F6DB5"),
    "kv_cache": ("KV cache", "#9CC3E6"),
    "embeddings": ("embeddings and head", "#B9B4A8"),
    "workspace": ("workspace (estimate)", "#DEDAD0"),
}
"""The parts from the bottom up, with label and colour; the KV cache is a lighter attention blue."""


def memory_picture(shares: Sequence[dict[str, Any]]) -> Figure:
    """Draw rows of `MemoryModel.shares` against sequence length, a panel per batch size."""

    def draw(axis: Axes, batch: int) -> None:
        rows = [row for row in shares if row["batch_size"] == batch]
        tokens = [row["seq_len_tokens"] for row in rows]
        axis.stackplot(
            tokens,
            *[[100 * row[part] for row in rows] for part in MEMORY_PARTS],
            colors=[colour for _, colour in MEMORY_PARTS.values()],
            labels=[label for label, _ in MEMORY_PARTS.values()],
            linewidth=0.6, edgecolor="white",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = tokens[::2]
        axis.set_xticks(ticks, [str(n) if n % 1024 else f"{n // 1024}k" for n in ticks])
        axis.set_ylim(0, 100)
        axis.grid(False)

    batches = sorted({row["batch_size"] for row in shares})
    parts = [
        Panel(partial(draw, batch=batch), f"batch {batch}", "sequence length (tokens)",
              "share of peak memory (%)")
        for batch in batches
    ]  # fmt: skip
    return panel_figure(parts, columns=len(batches), height=2.9, same_axes=True, sharey=True)


_OTHER_LEVEL = "#8D9299"  # of a level without a colour of its own


class LevelsLine(NamedTuple):
    """A line of `levels_picture`: a request at a budget.

    Attributes:
        request: Batch size and sequence length in tokens; lines of a request stand together.
        label: What the line is called.
        levels: Levels of the items that are not native, by name.
    """

    request: Shape
    label: str
    levels: Mapping[str, str]

    def level(self, item: str) -> str:
        """The level of an item; a cache whose block is removed counts as removed."""
        if self.levels.get(item.replace(".cache", ".attn")) == "removed":
            return "removed"
        return self.levels.get(item, "native")


def levels_picture(lines: Sequence[LevelsLine], num_layers: int) -> Figure:
    """Draw the level of each item: a line for each request and budget, a column for each layer."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    items = {
        "Attention weights": [block_name(2 * layer) for layer in range(num_layers)],
        "KV caches": [cache_name(layer) for layer in range(num_layers)],
        "FFN weights": [block_name(2 * layer + 1) for layer in range(num_layers)],
        "Emb.": [EMBEDDINGS],
    }
    widths = [*[num_layers] * 3, max(1, num_layers / 6)]
    with style():
        figure, axes = panels(
            1, len(items), sharey=True, height=1.1 + 0.21 * len(lines), width_ratios=widths
        )  # fmt: skip
        for axis, (title, names) in zip(axes, items.items(), strict=True):
            colours = [
                [to_rgb(LEVEL_COLOURS.get(line.level(name), _OTHER_LEVEL)) for name in names]
                for line in lines
            ]
            axis.pcolormesh(np.array(colours), edgecolors="white", linewidth=0.6, shading="flat")
            axis.grid(False)
            axis.tick_params(length=0)
            axis.set_ylim(len(lines), 0)  # the first line on top
            axis.set_title(title)
            axis.set_xlabel("layer" if len(names) > 1 else "")
            ticks = range(0, len(names), 5 if len(names) > 12 else 1)
            shown = ticks if len(names) > 1 else range(0)
            axis.set_xticks([tick + 0.5 for tick in shown], [str(tick) for tick in shown])
            for place in range(1, len(lines)):
                if lines[place].request != lines[place - 1].request:
                    axis.axhline(place, color=INK, linewidth=1.2)
        axes[0].set_yticks(np.arange(len(lines)) + 0.5, [line.label for line in lines])
        used = {line.level(name) for line in lines for names in items.values() for name in names}
        levels = [level for level in LEVEL_COLOURS if level in used]
        levels += sorted(used - set(levels))
        handles = [
            Patch(facecolor=LEVEL_COLOURS.get(level, _OTHER_LEVEL), edgecolor=FAINT, label=level)
            for level in levels
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=9)
    return figure


CURVES = {
    "episode/loss": "ΔNLL at the end of the episode\n(calibration text, nats/token)",
    "episode/return": "return of the episode",
}
"""Metrics drawn as learning curves, with axis labels."""

SMOOTHED_EPISODES = 50
"""Number of episodes that each point of a learning curve averages."""


def logged_curves(runs: Sequence[TrainingRun]) -> list[str]:
    """Return those of `CURVES` that some run has logged."""
    return [name for name in CURVES if any(run.series(name)[0] for run in runs)]


def learning_curves(runs: Sequence[TrainingRun]) -> Figure:
    """Draw the logged learning curves: thin for each seed, thick for the mean."""

    def draw(axis: Axes, name: str) -> None:
        for method in sorted({run.method for run in runs}):
            series = [_smooth(*run.series(name)) for run in runs if run.method == method]
            _draw_curves(axis, method, [(steps, values) for steps, values in series if steps])

    steps = "training step (one action each)"
    parts = [
        Panel(partial(draw, name=name), x=steps, y=CURVES[name]) for name in logged_curves(runs)
    ]
    return panel_figure(parts, height=2.8, legend=4)


def _smooth(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return moving averages over `SMOOTHED_EPISODES` episodes."""
    if not values:
        return [], []
    width = min(SMOOTHED_EPISODES, max(1, len(values) // 4))
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return steps[width - 1 :], means.tolist()


def _draw_curves(axis: Axes, method: str, series: Sequence[tuple[list[int], list[float]]]) -> None:
    colour = look(method).colour
    if not series:
        return
    label = f"{short_label(method)} ({len(series)} seed{'s' if len(series) > 1 else ''})"
    if len(series) == 1:
        axis.plot(*series[0], color=colour, linewidth=1.8, label=label)
        return
    for steps, values in series:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45)
    last = min(steps[-1] for steps, _ in series)  # the mean covers the steps that all seeds reached
    grid = np.linspace(max(steps[0] for steps, _ in series), last, 200)
    mean = np.mean([np.interp(grid, steps, values) for steps, values in series], axis=0)
    axis.plot(grid, mean, color=colour, linewidth=2.2, label=label)

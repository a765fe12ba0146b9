"""Figures of the learned policies: what they remove, and how they learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from experiments.comparison.figures import FAINT, panels, style
from experiments.comparison.labels import KIND_COLOURS, TIMES, look, short_label
from experiments.comparison.report_data import TrainingRun
from rap_env.blocks import BlockMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = (
    ("episode/loss", "loss of the episode's mask\n(calibration text, nats/token)"),
    ("episode/return", "return of the episode"),
)
"""Metrics drawn as learning curves, with their axis labels."""

SMOOTHED_EPISODES = 50
"""Episodes that a point of a learning curve is the mean of."""


class Removal(Protocol):
    """A mask chosen at a cell, such as a result row."""

    @property
    def cell(self) -> tuple[int, int, float]:
        """Batch size, sequence length in tokens, budget fraction."""

    @property
    def mask(self) -> list[str]:
        """Names of the removed blocks."""


def removal_picture(rows: Sequence[Removal], num_layers: int, narrow: bool) -> Figure:
    """Which blocks one method removes: requests and budgets down, layers across.

    Args:
        rows: Rows of one method; several seeds are averaged.
        num_layers: Number of the model's layers.
        narrow: Whether attn stands above ffn rather than beside it.
    """
    cells = sorted(
        {row.cell for row in rows}, key=lambda cell: (cell[0] * cell[1], cell[0], -cell[2])
    )
    shares = np.array([_removed_share(rows, cell, num_layers) for cell in cells])
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


def learning_curves(runs: Sequence[TrainingRun], narrow: bool) -> Figure | None:
    """Learning curves: each seed thin, the mean of an agent's seeds thick; None without data."""
    drawn = [(name, label) for name, label in CURVES if any(run.series(name)[0] for run in runs)]
    if not drawn:
        return None
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
    """Means over the last `SMOOTHED_EPISODES` episodes, from where there are enough of them."""
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
    last = min(steps[-1] for steps, _ in series)  # a mean of all seeds, as far as all went
    grid = np.linspace(max(steps[0] for steps, _ in series), last, 200)
    mean = np.mean([np.interp(grid, steps, values) for steps, values in series], axis=0)
    axis.plot(grid, mean, color=shown.colour, linewidth=2.2, label=label)


def _removed_share(
    rows: Sequence[Removal], cell: tuple[int, int, float], num_layers: int
) -> npt.NDArray[np.float64]:
    """Share of the method's rows at a cell that remove each block, shape (2L,)."""
    found = [row for row in rows if row.cell == cell]
    share = np.zeros(2 * num_layers)
    for row in found:
        share[list(BlockMask.of(*row.mask))] += 1 / len(found)
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


def _separate_requests(axis: Axes, cells: Sequence[tuple[int, int, float]]) -> None:
    axis.set_yticks(np.arange(len(cells)) + 0.5, [_cell_name(cell) for cell in cells])
    for place in range(1, len(cells)):
        if cells[place][:2] != cells[place - 1][:2]:
            axis.axhline(place, color=FAINT, linewidth=0.8)


def _cell_name(cell: tuple[int, int, float]) -> str:
    return f"{cell[0]} {TIMES} {cell[1]:,}  {100 * cell[2]:.0f} %"

"""The figure of the levels that a method chooses: a line a budget, a column an item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from experiments.comparison.records import ResultRow
from experiments.study.figures import FAINT, INK, panels, style
from experiments.study.looks import LEVEL_COLOURS
from experiments.study.tables import mebibytes, percent, shape_words
from rap_env.blocks import block_name
from rap_env.plan import EMBEDDINGS, cache_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OTHER = "#8D9299"  # of a level without a colour of its own


def short_and_long(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The requests with the fewest and the most tokens."""
    ordered = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    return list(dict.fromkeys([ordered[0], ordered[-1]]))


def levels_picture(rows: Sequence[ResultRow], num_layers: int, narrow: bool) -> Figure:
    """Draw the level of each item: a line for each row, a column for each layer.

    Args:
        rows: Rows of one method and seed; those of one request are drawn together.
        num_layers: Number of the model's layers.
        narrow: Whether the panels are below each other.
    """
    rows = sorted(rows, key=lambda row: (row.shape[0] * row.shape[1], -row.budget_bytes))
    layers = range(num_layers)
    items = {
        "Attention weights": [block_name(2 * layer) for layer in layers],
        "KV caches": [cache_name(layer) for layer in layers],
        "FFN weights": [block_name(2 * layer + 1) for layer in layers],
        "Emb.": [EMBEDDINGS],
    }
    shape = (len(items), 1) if narrow else (1, len(items))
    widths = None if narrow else [*[num_layers] * 3, max(1, num_layers / 6)]
    with style():
        figure, axes = panels(
            *shape, narrow=narrow, height=1.1 + 0.21 * len(rows), sharey=True, width_ratios=widths
        )
        found = {_level_of(row, n) for row in rows for names in items.values() for n in names}
        for axis, (title, names) in zip(axes, items.items(), strict=True):
            _draw(axis, _colours(rows, names))
            axis.set_title(title)
            axis.set_xlabel("layer" if len(names) > 1 else "")
            every = 5 if len(names) > 12 else 1
            ticks = range(0, len(names), every) if len(names) > 1 else range(0)
            axis.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
            for place in range(1, len(rows)):
                if rows[place].shape != rows[place - 1].shape:
                    axis.axhline(place, color=INK, linewidth=1.2)
        axes[0].set_yticks(np.arange(len(rows)) + 0.5, [_row_label(row) for row in rows])
        known = [level for level in LEVEL_COLOURS if level in found]
        _legend(figure, [*known, *sorted(found - set(known))], narrow)
    return figure


def _row_label(row: ResultRow) -> str:
    loss = "" if row.target_loss is None else f", ~{row.target_loss:g}"
    return (
        f"{shape_words(row.shape)}  {mebibytes(row.budget_bytes)} "
        f"({percent(row.budget_fraction, 0)}{loss})"
    )


def _level_of(row: ResultRow, name: str) -> str:
    """The level of an item; a cache whose block is removed counts as removed."""
    levels = row.plan.levels
    if levels.get(name.replace(".cache", ".attn")) == "removed":
        return "removed"
    return levels.get(name, "native")


def _colours(rows: Sequence[ResultRow], names: Sequence[str]) -> npt.NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    return np.array(
        [[to_rgb(LEVEL_COLOURS.get(_level_of(row, n), _OTHER)) for n in names] for row in rows]
    )


def _draw(axis: Axes, colours: npt.NDArray[np.float64]) -> None:
    axis.pcolormesh(colours, edgecolors="white", linewidth=0.6, shading="flat")
    axis.grid(False)
    axis.tick_params(length=0)
    axis.set_ylim(len(colours), 0)  # the first row on top
    for spine in axis.spines.values():
        spine.set_color(FAINT)


def _legend(figure: Figure, levels: Sequence[str], narrow: bool) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=LEVEL_COLOURS.get(level, _OTHER), edgecolor=FAINT, linewidth=0.5, label=level
        )
        for level in levels
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if narrow else 9)

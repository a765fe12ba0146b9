"""What all figures share: label and colour of each method and level, style, panels and series."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rap_env.artifacts import atomic_write
from rap_env.plan import EMBEDDINGS, block_name, cache_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image


LEVEL_COLOURS = {
    "native": "#EDEBE4", "int8": "#BBD7EE", "int4": "#84B8DF", "int4-compact": "#5C9FD1",
    "int3": "#2F78B9", "int2": "#0F4680",
    "window512": "#FCE3A8", "int4-window512": "#F9BE5B", "int4-window256": "#EA8A24",
    "int4-window128": "#B25309", "removed": "#22262C",
}  # fmt: skip
"""Colours of levels, from the most to the least exact one: darker blues are fewer bits. Blue
and orange are told apart with any kind of colour vision."""


def item_levels(levels: Mapping[str, str], num_layers: int) -> dict[str, list[str]]:
    """Return the level of each item by its kind, from the first layer to the last.

    Args:
        levels: `Plan.levels` of a plan.
        num_layers: Layers of the model.

    Returns:
        Lists by heading. A cache whose block is removed counts as removed.
    """

    def level(item: str) -> str:
        if levels.get(item.replace(".cache", ".attn")) == "removed":
            return "removed"
        return levels.get(item, "native")

    layers = range(num_layers)
    return {
        "Attention": [level(block_name(2 * layer)) for layer in layers],
        "KV caches": [level(cache_name(layer)) for layer in layers],
        "FFN": [level(block_name(2 * layer + 1)) for layer in layers],
        "Embeddings": [level(EMBEDDINGS)],
    }


@dataclass(frozen=True)
class Look:
    """Appearance of a method in tables and figures.

    Attributes:
        label: Name in headings and legends.
        colour: Hex code.
        marker: matplotlib marker.
        learned: Whether the method was trained.
    """

    label: str
    colour: str
    marker: str
    learned: bool = False


_LOOKS = {
    "rap": Look("RAP policy", "#F0001C", "*", learned=True),
    "rap-low-bits": Look("RAP policy", "#F0001C", "*"),
    "maskable_ppo": Look("MaskablePPO", "#C8324B", "o", learned=True),
    "ppo": Look("PPO", "#F2702E", "o", learned=True),
    "masked_dqn": Look("Masked DQN", "#8E4FA8", "o", learned=True),
    "dqn": Look("DQN", "#E377B8", "o", learned=True),
    "greedy_per_byte": Look("Greedy per byte", "#00707F", "s"),
    "frontier": Look("Frontier table", "#5B2BE0", "h"),
    "score_model": Look("Score model search", "#9C6ADE", "H"),
    "evolutionary": Look("Evolutionary", "#2FA52F", "p"),
    "beam": Look("Beam search", "#2FC98A", "H"),
    "uniform": Look("Uniform settings", "#A33B8F", "*"),
    "rap-v0": Look("RAP-v0 on int8 caches", "#E06C75", "*"),
    "gsi": Look("GSI order", "#2B4C9B", "D"),
    "knapsack": Look("Knapsack", "#35A79C", "^"),
    "one_shot_per_byte": Look("One-shot per byte", "#5C0A3C", "1"),
    "one_shot": Look("One-shot", "#7B9A2D", "v"),
    "block_influence": Look("Block influence", "#9A5F2C", "P"),
    "shortgpt": Look("ShortGPT", "#F4A582", "d"),
    "sleb": Look("SLEB", "#3F86FF", "|"),
    "tuned_list": Look("Tuned list", "#6B7A1E", "x"),
    "random": Look("Random", "#8D9299", "X"),
    "dense": Look("Dense (nothing removed)", "#1F2328", "_"),
}

_SPARE = ("#5B8C5A", "#B5651D", "#4B6C8B", "#A23B72", "#6B7A1E", "#7D5BA6")


def look(method: str) -> Look:
    """Return the appearance of a method; variants of an agent (``ppo-gamma=0.9``) differ."""
    if method in _LOOKS:
        return _LOOKS[method]
    base = max(
        (name for name in _LOOKS if re.match(rf"{re.escape(name)}\b", method)),
        key=len, default=None,
    )  # fmt: skip
    number = int(hashlib.sha256(method.encode()).hexdigest()[:8], 16)
    colour = _SPARE[number % len(_SPARE)]
    if base is None:
        return Look(method, colour, "d")
    parent = _LOOKS[base]
    label = f"{parent.label} {method[len(base) :].lstrip('-')}".strip()
    return Look(label, colour, "d", parent.learned)


def short_label(method: str, length: int = 26) -> str:
    """Return the label of a method, shortened in the middle: variants differ at the end."""
    label = look(method).label
    if len(label) <= length:
        return label
    tail = (length - 2) // 2
    return f"{label[: length - 2 - tail]}..{label[-tail:]}"


def rank(method: str) -> int:
    """Return the position of a method in legends: learned ones, then baselines, then dense."""
    names = list(_LOOKS)
    if method in names:
        return names.index(method)
    for place, name in enumerate(names):
        if method.startswith(f"{name}-"):
            return place
    return len(names)


INK, FAINT, GRID = "#1F2328", "#6B7178", "#E6E4DE"

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
        **looks: As for `matplotlib.axes.Axes.errorbar`, such as ``color``, ``label``,
            ``marker``.
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


def save_gif(images: Sequence[Image.Image], path: Path) -> None:
    """Write an animation of eight pictures a second, which begins and ends with the last one."""
    from PIL.Image import Dither

    palette = images[-1].quantize(64)  # it has all colours
    shown = [images[-1], *images]
    frames = [image.quantize(palette=palette, dither=Dither.NONE) for image in shown]
    times_ms = [2500] + [125] * len(images)
    with atomic_write(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=times_ms, loop=0
        )


def plain_log_ticks(axis: Any) -> None:
    """Format tick labels of an axis as plain numbers such as 0.5 or 20, whatever the scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

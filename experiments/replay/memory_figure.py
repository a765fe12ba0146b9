"""One system's memory over time, with the mask as a heat strip below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.comparison.figures import FAINT, INK
from experiments.comparison.labels import KIND_COLOURS, Look, look
from experiments.comparison.tables import percent
from experiments.replay.rows import ReplayRow
from experiments.replay.tables import megabyte_seconds, system_label
from experiments.replay.time_series import mask_of_code

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METHODS = {
    "static_gsi": "gsi",
    "static_gsi_lean": "sleb",  # a colour of its own
    "static_shortgpt": "shortgpt",
    "greedy": "greedy_per_byte",
}
_MARKERS = {"dense": "o", "static_gsi_lean": "v"}
_STRIP_COLUMNS = 1200
_MIB = 2**20


def system_look(name: str) -> Look:
    """How a system is drawn: as the method that it serves with."""
    found = look(_METHODS.get(name, name))
    return replace(found, marker=_MARKERS.get(name, found.marker))


def draw_system(
    part: Any,
    row: ReplayRow,
    steps: Sequence[Mapping[str, Any]],
    num_layers: int,
    bounds: tuple[float, float],
    end_s: float,
) -> None:
    """Draw one system: its memory above, its masks below.

    Args:
        part: Where to draw.
        row: The system's row.
        steps: Its thinned trail.
        num_layers: Layers of the model.
        bounds: Least and most MiB of all systems that are drawn together.
        end_s: Longest time of all of them.
    """
    upper, lower = part.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1.5, 1.0], "hspace": 0.03}
    )
    _draw_memory(upper, row, steps, bounds)
    _draw_strip(lower, steps, num_layers, end_s)
    upper.set_xlim(0, end_s)
    upper.set_title(
        f"{system_label(row.system)}: {percent(row.served_fraction, 0)} served, "
        f"{megabyte_seconds(row)} over the budget, {row.switches} switches"
    )
    upper.legend(loc="upper right", ncols=3, fontsize=7.5)


def _draw_memory(
    axis: Axes, row: ReplayRow, steps: Sequence[Mapping[str, Any]], bounds: tuple[float, float]
) -> None:
    times = np.array([step["time_s"] for step in steps] + [steps[-1]["until_s"]])
    budget, peak = (
        np.array([step[key] for step in steps] + [steps[-1][key]]) / _MIB
        for key in ("budget_bytes", "peak_bytes")
    )
    low, high = bounds
    top = high + 0.2 * (high - low)  # room for the legend
    colour = FAINT if row.system == "dense" else system_look(row.system).colour
    axis.fill_between(times, budget, top, step="post", color="#EFEDE8", linewidth=0, zorder=0)
    axis.fill_between(
        times, budget, np.maximum(peak, budget), step="post", color="#C53030", alpha=0.4,
        linewidth=0, zorder=1, label="over the budget" if row.violations else None,
    )  # fmt: skip
    axis.step(times, budget, where="post", color=INK, linewidth=1.3, label="budget", zorder=3)
    axis.step(times, peak, where="post", color=colour, linewidth=1.0, label="measured", zorder=2)
    axis.set_ylim(low, top)
    axis.set_ylabel("memory (MiB)")
    axis.tick_params(labelbottom=False)
    axis.grid(axis="x", visible=False)


def _draw_strip(
    axis: Axes, steps: Sequence[Mapping[str, Any]], num_layers: int, end_s: float
) -> None:
    """Time across; a line a layer, attention blocks above and FFN blocks below."""
    from matplotlib.colors import to_rgb

    picture = np.ones((2 * num_layers + 1, _STRIP_COLUMNS, 3))
    removed = _removed_over_time(steps, num_layers, end_s)
    for half, kind in enumerate(("attn", "ffn")):
        top = half * (num_layers + 1)
        part = picture[top : top + num_layers]
        part[:] = to_rgb("#F4F3EF")
        part[removed[half]] = to_rgb(KIND_COLOURS[kind])
    axis.imshow(
        picture, aspect="auto", interpolation="nearest", origin="upper",
        extent=(0, end_s, 2 * num_layers + 1, 0),
    )  # fmt: skip
    axis.set_yticks([num_layers / 2, 1.5 * num_layers + 1], ["attn", "ffn"])
    axis.tick_params(axis="y", length=0)
    for label, kind in zip(axis.get_yticklabels(), ("attn", "ffn"), strict=True):
        label.set_color(KIND_COLOURS[kind])
    axis.set_ylabel("removed blocks\n(layer 0 on top)", fontsize=8)
    axis.set_xlabel("time of the replay (s)")
    axis.grid(visible=False)


def _removed_over_time(
    steps: Sequence[Mapping[str, Any]], num_layers: int, end_s: float
) -> npt.NDArray[np.bool_]:
    """Whether each block is removed at each moment, (2 kinds, L, moments)."""
    starts = [step["time_s"] for step in steps]
    moments = (np.arange(_STRIP_COLUMNS) + 0.5) * end_s / _STRIP_COLUMNS
    places = np.clip(np.searchsorted(starts, moments, side="right") - 1, 0, None)
    masks = np.zeros((len(steps), 2 * num_layers), dtype=bool)
    for number, step in enumerate(steps):
        masks[number, list(mask_of_code(step["mask"]))] = True
    shown = masks[places]
    shown[moments > steps[-1]["until_s"]] = False
    return np.stack([shown[:, 0::2].T, shown[:, 1::2].T])

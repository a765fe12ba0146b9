"""Figures of a replay, from its records alone.

They are drawn at the end of a replay, and again with::

    python -m experiments.replay.figures FOLDER   # a folder that holds replay.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.replay.records import ReplayRow
from experiments.replay.tables import megabyte_seconds, system_label
from experiments.replay.time_series import recorded_mask
from experiments.study.figures import FAINT, INK, PNG_DPI, WIDE_IN, panels, plain_log_ticks, style
from experiments.study.looks import KIND_COLOURS, Look, look
from experiments.study.records import read_records
from experiments.study.tables import percent
from rap_env.artifacts import atomic_write
from rap_env.errors import RapError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("dense", "static_gsi", "rap")
"""Systems whose memory over time is drawn in one figure; each has its own figure as well."""

_METHODS = {
    "static_gsi": "gsi",
    "static_gsi_lean": "sleb",  # its own colour
    "static_shortgpt": "shortgpt",
    "greedy": "greedy_per_byte",
}
_MARKERS = {"dense": "o", "static_gsi_lean": "v"}
_STRIP_COLUMNS = 1200
_MIB = 2**20


@dataclass(frozen=True)
class ReplayRecords:
    """All records of a replay.

    Attributes:
        rows: A row for each system.
        steps: By system: its downsampled time series.
        requests: By system: a record for each request.
    """

    rows: list[ReplayRow]
    steps: dict[str, list[dict[str, Any]]]
    requests: dict[str, list[dict[str, Any]]]

    @property
    def num_layers(self) -> int:
        """Layers of the model; without provenance, up to the highest layer with a removed block."""
        known = [row.provenance.get("depends_on", {}).get("num_layers") for row in self.rows]
        masks = [recorded_mask(step["mask"]) for steps in self.steps.values() for step in steps]
        highest = max((index for mask in masks for index in mask.indices), default=0)
        return next((int(n) for n in known if n), highest // 2 + 1)


def read_replay(folder: Path) -> ReplayRecords:
    """Read the records of a run folder, or of a folder that they were copied to."""
    latest = {row.system: row for row in ReplayRow.read(folder / "replay.jsonl")}
    rows = list(latest.values())
    steps = {n: read_records(folder / "replay_steps" / f"{n}.jsonl") for n in latest}
    requests = {n: read_records(folder / "replay_requests" / f"{n}.jsonl") for n in latest}
    return ReplayRecords(rows, steps, requests)


def draw_all(source: Path, target: Path) -> list[Path]:
    """Draw every figure as a PNG file."""
    found = read_replay(source)
    if not found.rows:
        return []
    figures = {
        "replay_latency": latency(found),
        "replay_quality": quality(found),
    }
    with_steps = [row.system for row in found.rows if found.steps[row.system]]
    shown = [name for name in SHOWN if name in with_steps] or with_steps[:3]
    if shown:
        figures["replay_memory"] = memory_over_time(found, shown)
    for name in with_steps:
        figures[f"replay_memory_{name}"] = memory_over_time(found, [name])
    paths = []
    for name, figure in figures.items():
        paths.append(target / f"{name}.png")
        with style(), atomic_write(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=PNG_DPI)
    return paths


def memory_over_time(found: ReplayRecords, systems: Sequence[str]) -> Figure:
    """Measured memory against the budget, and below it which blocks were removed."""
    from matplotlib.figure import Figure

    rows = {row.system: row for row in found.rows}
    end = max(step["until_s"] for name in systems for step in found.steps[name])
    values = [step[key] for name in systems for step in found.steps[name]
              for key in ("peak_bytes", "budget_bytes")]  # fmt: skip
    bounds = 0.97 * min(values) / 2**20, 1.02 * max(values) / 2**20
    with style():
        figure = Figure(figsize=(WIDE_IN, 3.4 * len(systems)), layout="constrained")
        parts = np.atleast_1d(np.asarray(figure.subfigures(len(systems), 1)))
        for part, name in zip(parts.flat, systems, strict=True):
            _draw_system(part, rows[name], found.steps[name], found.num_layers, bounds, end)
    return figure


def system_look(name: str) -> Look:
    """Style of a system in figures: that of the method that chooses its masks."""
    found = look(_METHODS.get(name, name))
    return replace(found, marker=_MARKERS.get(name, found.marker))


def _draw_system(
    part: Any,
    row: ReplayRow,
    steps: Sequence[Mapping[str, Any]],
    num_layers: int,
    bounds: tuple[float, float],
    end_s: float,
) -> None:
    """Draw a system: its memory above, within `bounds` in MiB, and its masks below."""
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
    top = high + 0.2 * (high - low)  # space for the legend
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
    """Draw removed blocks over time: one line per layer, attn blocks above ffn blocks."""
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
    """Whether each block is removed at each time, shape (2 kinds, L, times)."""
    starts = [step["time_s"] for step in steps]
    times = (np.arange(_STRIP_COLUMNS) + 0.5) * end_s / _STRIP_COLUMNS
    places = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
    masks = np.zeros((len(steps), 2 * num_layers), dtype=bool)
    for number, step in enumerate(steps):
        masks[number, list(recorded_mask(step["mask"]))] = True
    shown = masks[places]
    shown[times > steps[-1]["until_s"]] = False
    return np.stack([shown[:, 0::2].T, shown[:, 1::2].T])


def latency(found: ReplayRecords) -> Figure:
    """Cumulative share of requests over latency, one line per system."""
    with style():
        figure, axes = panels(1, 2, narrow=False, height=3.3)
        for axis, key, title in (
            (axes[0], "ttft_s", "Time to the first token"),
            (axes[1], "tpot_s", "Time per output token"),
        ):
            for row in found.rows:
                requests = found.requests[row.system]
                _draw_shares(axis, row.system, _values(requests, key), _expected(requests, key))
            axis.set_title(title)
            axis.set_xlabel("seconds (log scale)")
            axis.set_xscale("log")
            plain_log_ticks(axis.xaxis)
            axis.set_ylim(0, 102)
        axes[0].set_ylabel("share of all requests (%)")
        _shared_legend(figure, axes[0])
    return figure


def quality(found: ReplayRecords) -> Figure:
    """ΔNLL of the generated text against budget violations, and against served requests.

    Marks are shifted slightly sideways, so that equal values remain visible.
    """
    with style():
        figure, axes = panels(1, 2, narrow=False, height=3.3, sharey=True)
        shares = [100 * row.served_fraction for row in found.rows]
        apart = 0.018 * max(20.0, max(shares) - min(shares))
        for place, row in enumerate(found.rows):
            shift = place - (len(found.rows) - 1) / 2
            over = row.violation_byte_s / 1e6
            _draw_delta_nll(axes[0], row, over + 0.05 * shift if over < 1 else over)
            _draw_delta_nll(axes[1], row, shares[place] + apart * shift)
        most = max(row.violation_byte_s for row in found.rows) / 1e6
        axes[0].set_xscale("symlog", linthresh=1.0)
        axes[0].set_xlim(-0.3, max(2.0, 3 * most))
        plain_log_ticks(axes[0].xaxis)
        axes[0].set_xlabel("measured bytes above the budget (MB s, log scale from 1)")
        axes[1].set_xlabel("requests served (%)")
        axes[0].set_title("ΔNLL against budget violations")
        axes[1].set_title("ΔNLL against served requests")
        axes[0].set_ylabel("ΔNLL of the generated text\n(nats/token, dense model)")
        _shared_legend(figure, axes[0])
    return figure


def _draw_shares(axis: Axes, system: str, values: Sequence[float], expected: int) -> None:
    """Draw shares of all requests; requests without a value lower the end of the line."""
    shown = system_look(system)
    if not values:
        axis.plot([], [], color=shown.colour, label=system_label(system))
        return
    ordered = np.sort(np.asarray([min(values), *values]))
    shares = 100 * np.arange(len(ordered)) / expected
    width = 2.0 if shown.learned else 1.2
    axis.step(
        ordered, shares, where="post", color=shown.colour, linewidth=width,
        linestyle="-" if shown.learned or system == "dense" else (0, (4, 1.5)),
        label=system_label(system), zorder=5 if shown.learned else 3,
    )  # fmt: skip


def _draw_delta_nll(axis: Axes, row: ReplayRow, x: float) -> None:
    shown = system_look(row.system)
    if row.loss_mean is None or row.loss_ci_low is None or row.loss_ci_high is None:
        return
    spread = [[row.loss_mean - row.loss_ci_low], [row.loss_ci_high - row.loss_mean]]
    axis.errorbar(
        x, row.loss_mean, yerr=spread, fmt=shown.marker, color=shown.colour,
        markersize=10 if shown.learned else 7, capsize=3, elinewidth=0.9,
        label=system_label(row.system), zorder=5 if shown.learned else 3,
    )  # fmt: skip
    axis.axhline(0, color=FAINT, linewidth=0.7, zorder=1)


def _values(requests: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    served = (request for request in requests if request["outcome"] == "served")
    return [request[key] for request in served if request[key] is not None]


def _expected(requests: Sequence[Mapping[str, Any]], key: str) -> int:
    """Requests that have a value if served; TPOT needs at least two tokens."""
    least = 2 if key == "tpot_s" else 1
    return max(1, sum(1 for request in requests if request["new_tokens"] >= least))


def _shared_legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, handlelength=1.8)


def main(arguments: list[str]) -> int:
    """Draw the figures of the folder named on the command line; return the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("Usage: python -m experiments.replay.figures FOLDER\n")
        return 2
    folder = Path(arguments[0])
    try:
        paths = draw_all(folder, folder / "figures")
    except RapError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{path}\n" for path in paths) or f"{folder} has no rows to draw.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

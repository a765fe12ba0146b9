"""Figures of a replay, from its records alone.

They are drawn at the end of a replay, and again with::

    python -m experiments.replay.figures FOLDER   # one that holds replay.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.comparison.figures import (
    FAINT,
    NARROW_IN,
    PNG_DPI,
    WIDE_IN,
    panels,
    plain_log_ticks,
    style,
)
from experiments.comparison.records import read_records
from experiments.replay.memory_figure import draw_system, system_look
from experiments.replay.rows import ReplayRow
from experiments.replay.tables import system_label
from rap_env.artifacts import atomic_write
from rap_env.errors import RapError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("dense", "static_gsi", "rap")
"""Systems whose memory over time is drawn together; each has a figure of its own too."""


@dataclass(frozen=True)
class Replayed:
    """All records of a replay.

    Attributes:
        rows: A row for each system.
        steps: By system: its thinned trail.
        requests: By system: a record for each request.
    """

    rows: list[ReplayRow]
    steps: dict[str, list[dict[str, Any]]]
    requests: dict[str, list[dict[str, Any]]]

    @property
    def num_layers(self) -> int:
        """Layers of the model, as far as masks tell: those of the lowest removed blocks too."""
        codes = {step["mask"] for steps in self.steps.values() for step in steps}
        bits = max((int(code, 16).bit_length() for code in codes), default=0)
        known = [row.provenance.get("depends_on", {}).get("num_layers") for row in self.rows]
        return next((int(n) for n in known if n), max(1, -(-bits // 2)))


def read_replayed(folder: Path) -> Replayed:
    """The records of a run folder, or of a folder that they were copied to.

    Raises:
        ArtifactError: A record is damaged.
    """
    latest = {row.system: row for row in ReplayRow.read(folder / "replay.jsonl")}
    rows = list(latest.values())
    steps = {n: read_records(folder / "replay_steps" / f"{n}.jsonl") for n in latest}
    requests = {n: read_records(folder / "replay_requests" / f"{n}.jsonl") for n in latest}
    return Replayed(rows, steps, requests)


def draw_all(source: Path, target: Path) -> list[Path]:
    """Draw every figure as a PNG file.

    Args:
        source: Folder with ``replay.jsonl`` and what lies beside it.
        target: Folder that they go to.

    Raises:
        ArtifactError: A record is damaged.
        MissingDependencyError: matplotlib is not installed.
    """
    found = read_replayed(source)
    if not found.rows:
        return []
    figures = {
        "replay_latency": latency(found, narrow=False),
        "replay_quality": quality(found, narrow=False),
    }
    with_steps = [row.system for row in found.rows if found.steps[row.system]]
    shown = [name for name in SHOWN if name in with_steps] or with_steps[:3]
    if shown:
        figures["replay_memory"] = memory_over_time(found, shown, narrow=False)
    for name in with_steps:
        figures[f"replay_memory_{name}"] = memory_over_time(found, [name], narrow=False)
    paths = []
    for name, figure in figures.items():
        paths.append(target / f"{name}.png")
        with style(), atomic_write(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=PNG_DPI)
    return paths


def memory_over_time(found: Replayed, systems: Sequence[str], narrow: bool) -> Figure:
    """Measured memory against the budget, and below it which blocks were removed.

    Args:
        found: The records.
        systems: Systems, a panel each.
        narrow: Whether it is for a phone.
    """
    from matplotlib.figure import Figure

    rows = {row.system: row for row in found.rows}
    end = max(step["until_s"] for name in systems for step in found.steps[name])
    values = [step[key] for name in systems for step in found.steps[name]
              for key in ("peak_bytes", "budget_bytes")]  # fmt: skip
    bounds = 0.97 * min(values) / 2**20, 1.02 * max(values) / 2**20
    with style():
        width = NARROW_IN if narrow else WIDE_IN
        figure = Figure(figsize=(width, 3.4 * len(systems)), layout="constrained")
        parts = np.atleast_1d(np.asarray(figure.subfigures(len(systems), 1)))
        for part, name in zip(parts.flat, systems, strict=True):
            draw_system(part, rows[name], found.steps[name], found.num_layers, bounds, end)
    return figure


def latency(found: Replayed, narrow: bool) -> Figure:
    """Shares of all requests whose tokens came within a time, a line for each system."""
    with style():
        shape = (2, 1) if narrow else (1, 2)
        figure, axes = panels(*shape, narrow=narrow, height=3.3)
        for axis, key, title in (
            (axes[0], "ttft_s", "Time to the first token"),
            (axes[1], "tpot_s", "Time per output token"),
        ):
            for row in found.rows:
                requests = found.requests[row.system]
                _draw_shares(axis, row.system, _values(requests, key), _asked(requests, key))
            axis.set_title(title)
            axis.set_xlabel("seconds (log scale)")
            axis.set_xscale("log")
            plain_log_ticks(axis.xaxis)
            axis.set_ylim(0, 102)
        axes[0].set_ylabel("share of all requests (%)")
        _shared_legend(figure, axes[0], narrow)
    return figure


def quality(found: Replayed, narrow: bool) -> Figure:
    """Loss of what was generated against bytes above the budget, and against who was served.

    Marks are moved a little sideways, so that those at one place can be told apart.
    """
    with style():
        shape = (2, 1) if narrow else (1, 2)
        figure, axes = panels(*shape, narrow=narrow, height=3.3, sharey=True)
        shares = [100 * row.served_fraction for row in found.rows]
        apart = 0.018 * max(20.0, max(shares) - min(shares))
        for place, row in enumerate(found.rows):
            shift = place - (len(found.rows) - 1) / 2  # marks at one place would hide each other
            over = row.violation_byte_s / 1e6
            _draw_loss(axes[0], row, over + 0.05 * shift if over < 1 else over)
            _draw_loss(axes[1], row, shares[place] + apart * shift)
        most = max(row.violation_byte_s for row in found.rows) / 1e6
        axes[0].set_xscale("symlog", linthresh=1.0)
        axes[0].set_xlim(-0.3, max(2.0, 3 * most))
        plain_log_ticks(axes[0].xaxis)
        axes[0].set_xlabel("measured bytes above the budget (MB s, log scale from 1)")
        axes[1].set_xlabel("requests served (%)")
        axes[0].set_title("Loss against violations")
        axes[1].set_title("Loss against who was served")
        for axis in axes[: len(axes) if narrow else 1]:
            axis.set_ylabel("loss of the generated text\n(nats/token, dense model)")
        _shared_legend(figure, axes[0], narrow)
    return figure


def _draw_shares(axis: Axes, system: str, values: Sequence[float], asked: int) -> None:
    """Shares of all requests: those that were never served are not among the values."""
    shown = system_look(system)
    if not values:
        axis.plot([], [], color=shown.colour, label=system_label(system))
        return
    ordered = np.sort(np.asarray([min(values), *values]))
    shares = 100 * np.arange(len(ordered)) / asked
    width = 2.0 if shown.learned else 1.2
    axis.step(
        ordered, shares, where="post", color=shown.colour, linewidth=width,
        linestyle="-" if shown.learned or system == "dense" else (0, (4, 1.5)),
        label=system_label(system), zorder=5 if shown.learned else 3,
    )  # fmt: skip


def _draw_loss(axis: Axes, row: ReplayRow, x: float) -> None:
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


def _asked(requests: Sequence[Mapping[str, Any]], key: str) -> int:
    """Requests that would have a value, had they been served; one token has no time after it."""
    least = 2 if key == "tpot_s" else 1
    return max(1, sum(1 for request in requests if request["new_tokens"] >= least))


def _shared_legend(figure: Figure, axis: Axes, narrow: bool) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if narrow else 4, handlelength=1.8
    )


def main(arguments: list[str]) -> int:
    """Draw the figures of the folder named on the command line; the exit status."""
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

"""Rows of a replay, and the figure of their memory against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config.replay_settings import UNIFORM_SYSTEMS
from experiments.study.json_records import Record
from experiments.study.looks import KIND_COLOURS, look
from experiments.study.plotting import (
    FAINT,
    INK,
    WIDE_IN,
    style,
)
from experiments.study.table_format import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "dense": "Dense",
    "static_gsi": "Static, GSI",
    "static_gsi_lean": "Static, lean",
    "static_shortgpt": "Static, ShortGPT",
    "greedy": "Greedy, live",
    "frontier": "Frontier table",
    "rap": "RAP policy",
    "oracle": "Oracle",
    "knapsack": "Knapsack over levels",
    **{
        name: "Uniform, {1} weights, {2} cache".format(*name.split("_")) for name in UNIFORM_SYSTEMS
    },
}
"""Names of systems in tables and figures."""

SHOWN = ("dense", "static_gsi", "rap")
"""Systems whose memory over time is drawn, if they were run; else the first three."""

_METHODS = {
    "static_gsi": "gsi",
    "static_gsi_lean": "sleb",  # its own colour
    "static_shortgpt": "shortgpt",
    "greedy": "greedy_per_byte",
}
_STRIP_COLUMNS = 1200
_MIB = 2**20


@dataclass(frozen=True)
class ReplayRow(Record):
    """One system. Times are seconds of the replay's clock.

    Attributes:
        system: Its name, as in ``replay.systems``.
        outcomes: Number of requests with each of the outcomes of `RequestOutcome`.
        preemptions: How often a running request was returned to the queue.
        violation_byte_s: Integral of the measured bytes above the budget at the start of each
            step, in byte-seconds, idle time included.
        violations: Steps and idle intervals with measured bytes above the budget.
        peak_bytes: Maximum of the measured bytes.
        budget_least_bytes: Minimum of the budget while the system ran.
        ttft_s: Time to the first token of each served request, from its arrival.
        tpot_s: Time per output token after the first.
        several_tokens: Requests for at least two tokens, which have the latter.
        tokens_per_s: Tokens of served requests per second from first arrival to last token.
        overhead_fraction: Seconds of decisions and switches as a share of the work.
        decisions: Number of decisions; `decision_s` are their seconds.
        switches: Changes of the plan; `switch_s` are their seconds.
        plans: Different plans under which tokens were generated.
        removed_mean: Removed blocks, mean over generated tokens.
        lowered_mean: Kept items below their native level, mean over generated tokens.
        losses: NLL of each served request's tokens under the dense model minus that of the dense
            model's own greedy continuation of the same prompt and length, nats per token.
        mask_loss_mean: ΔNLL of the plans on held-out text, mean over generated tokens, nats per
            token; None if it was not measured.
        same_fraction: Share of generated tokens equal to the dense model's own continuation.
        right: For each served request with a known answer whether it was given.
        steps: About 600 times: start and end in seconds; bytes and budget where the bytes exceeded
            it most; the removed blocks of the plan that lasted longest.
    """

    file = "replay.jsonl"
    record_name = "A replay record"
    rerun = "run the replay again"
    identity = ("system",)

    system: str
    outcomes: dict[str, int]
    preemptions: int
    violation_byte_s: float
    violations: int
    peak_bytes: int
    budget_least_bytes: int
    ttft_s: list[float]
    tpot_s: list[float]
    several_tokens: int
    tokens_per_s: float
    overhead_fraction: float
    decisions: int
    decision_s: float
    switches: int
    switch_s: float
    plans: int
    removed_mean: float | None
    lowered_mean: float | None
    losses: list[float]
    mask_loss_mean: float | None
    same_fraction: float | None
    right: list[bool]
    steps: list[list[Any]]

    @property
    def requests(self) -> int:
        """Requests that arrived."""
        return sum(self.outcomes.values())

    @property
    def served(self) -> int:
        """Requests that got all their tokens."""
        return self.outcomes.get("served", 0)

    @property
    def over_words(self) -> str:
        """The byte-seconds above the budget, in words."""
        amount = self.violation_byte_s / 1e6
        return "0" if amount == 0 else f"{amount:{',.0f' if amount >= 100 else '.3g'}} MB s"


def memory_over_time(rows: Sequence[ReplayRow]) -> Figure:
    """Measured memory against the budget, and below it which blocks were removed."""
    from matplotlib.figure import Figure

    with style():
        shown = [row for row in rows if row.system in SHOWN] or rows[:3]
        end = max(step[1] for row in shown for step in row.steps)
        values = [value for row in shown for step in row.steps for value in step[2:4]]
        bounds = 0.97 * min(values) / _MIB, 1.02 * max(values) / _MIB
        figure = Figure(figsize=(WIDE_IN, 3.4 * len(shown)), layout="constrained")
        parts = np.atleast_1d(np.asarray(figure.subfigures(len(shown), 1)))
        for part, row in zip(parts.flat, shown, strict=True):
            upper, lower = part.subplots(
                2, 1, sharex=True, gridspec_kw={"height_ratios": [1.5, 1.0], "hspace": 0.03}
            )
            _draw_memory(upper, row, bounds)
            _draw_removed(lower, row, end)
            upper.set_xlim(0, end)
    return figure


def _draw_memory(axis: Axes, row: ReplayRow, bounds: tuple[float, float]) -> None:
    times = np.array([step[0] for step in row.steps] + [row.steps[-1][1]])
    peak, budget = (
        np.array([step[place] for step in (*row.steps, row.steps[-1])]) / _MIB for place in (2, 3)
    )
    low, high = bounds
    top = high + 0.2 * (high - low)  # space for the legend
    colour = FAINT if row.system == "dense" else _colour(row.system)
    axis.fill_between(times, budget, top, step="post", color="#EFEDE8", linewidth=0, zorder=0)
    axis.fill_between(
        times, budget, np.maximum(peak, budget), step="post", color="#C53030", alpha=0.4,
        linewidth=0, zorder=1, label="over the budget" if row.violations else None,
    )  # fmt: skip
    axis.step(times, budget, where="post", color=INK, linewidth=1.3, label="budget", zorder=3)
    axis.step(times, peak, where="post", color=colour, linewidth=1.0, label="measured", zorder=2)
    axis.set(ylim=(low, top), ylabel="memory (MiB)")
    axis.set_title(
        f"{LABELS[row.system]}: {percent(row.served / row.requests, 0)} served, "
        f"{row.over_words} over the budget, {row.switches} switches"
    )
    axis.tick_params(labelbottom=False)
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", ncols=3, fontsize=7.5)


def _draw_removed(axis: Axes, row: ReplayRow, end_s: float) -> None:
    """Draw removed blocks over time: one line per layer, attn blocks above ffn blocks."""
    from matplotlib.colors import to_rgb

    layers = int(row.depends_on["num_layers"])
    times = (np.arange(_STRIP_COLUMNS) + 0.5) * end_s / _STRIP_COLUMNS
    places = np.searchsorted([step[0] for step in row.steps], times, side="right") - 1
    removed = np.zeros((len(row.steps), 2 * layers), dtype=bool)
    for number, step in enumerate(row.steps):
        removed[number, step[4]] = True
    shown = removed[np.clip(places, 0, None)]
    shown[times > row.steps[-1][1]] = False
    picture = np.ones((2 * layers + 1, _STRIP_COLUMNS, 3))
    for half, kind in enumerate(("attn", "ffn")):
        part = picture[half * (layers + 1) :][:layers]
        part[:] = to_rgb("#F4F3EF")
        part[shown[:, half::2].T] = to_rgb(KIND_COLOURS[kind])
    axis.imshow(
        picture, aspect="auto", interpolation="nearest", origin="upper",
        extent=(0, end_s, 2 * layers + 1, 0),
    )  # fmt: skip
    axis.set_yticks([layers / 2, 1.5 * layers + 1], ["attn", "ffn"])
    axis.tick_params(axis="y", length=0)
    for label, kind in zip(axis.get_yticklabels(), ("attn", "ffn"), strict=True):
        label.set_color(KIND_COLOURS[kind])
    axis.set_ylabel("removed blocks\n(layer 0 on top)", fontsize=8)
    axis.set_xlabel("time of the replay (s)")
    axis.grid(visible=False)


def _colour(system: str) -> str:
    return look(_METHODS.get(system, system)).colour

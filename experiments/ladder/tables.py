"""Tables and the figure of all ladder programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from experiments.ladder.rows import Ladder, LadderRow, LlamaCppRow, OutsideRow, ShippedRow
from experiments.study.figures import FAINT, INK, Panel, panel_figure
from experiments.study.records import LossRecord, Shape
from experiments.study.tables import (
    Table,
    TitledTable,
    columns_table,
    crossed_table,
    percent,
    shape_words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIFORM_CAPTION = (
    "One level for all weights and one for all caches (embeddings with the head at int8 where "
    "weights are lowered). ΔNLL over unquantised weights and caches, nats per token with a 95 % "
    "interval over windows; MiB of weights and KV cache for each request (batch x tokens)."
)
POLICY_CAPTION = (
    "At each budget (share of the unquantised model's peak) the ΔNLL of removing blocks alone, and "
    "of a knapsack over the levels of all items. A dash: not measured; *: exceeds the budget."
)
LLAMA_CPP_CAPTION = (
    "llama.cpp on the same file and the same windows of token ids. MiB of weights and KV cache, "
    "and in brackets the resident memory of the process beyond what it had without a model."
)
SHIPPED_CAPTION = (
    "MiB of the weights that were lowered, and ΔNLL over the model as its file has it, nats per "
    "token with a 95 % interval over windows, of one level for the weights of all blocks or of "
    "their FFN, for embeddings with the head, or for all caches; in brackets the file's format. "
    "A file with four bits loses nothing at four; that says little about models shipped in more."
)
OUTSIDE_CAPTION = (
    "Bytes of all weights, embeddings included, and the difference from the unquantised model on "
    "the same windows: ΔNLL with a 95 % interval over windows, KL divergence (mean and 99th "
    "percentile over tokens, nats), and the share of tokens at which both find the same token "
    "most likely. `+embeddings`: these have few bits too. Types: matrices in llama.cpp's file."
)
_ROUNDINGS = {"nearest": ", rounded to nearest", "calibrated": ", GPTQ on calibration text"}


REMOVAL, KNAPSACK, UNIFORM, LLAMA = "#C8324B", "#00707F", "#6B7178", "#E0812F"
OUTSIDE = {
    "knapsack": ("knapsack over levels", KNAPSACK, "o"),
    "uniform": ("one level", UNIFORM, "s"),
    "llama.cpp": ("llama.cpp", LLAMA, "D"),
    "ReplaceMe, least squares": ("ReplaceMe (least squares)", "#5B2BE0", "v"),
    "ReplaceMe, cosine": ("ReplaceMe (cosine)", "#9C6ADE", "^"),
    "LinearPatch": ("LinearPatch", "#2B4C9B", "X"),
    "ShortGPT": ("ShortGPT", REMOVAL, "P"),
    "EoRA": ("EoRA", "#8A6D3B", "*"),
}
"""Label, colour and marker of each method of `OutsideRow`."""

_LINEAR = 0.01  # nats per token up to which the axis of ΔNLL is linear
_TICKS = (0, 0.01, 0.1, 1, 10)
_LEAST_GAIN = 0.002  # nats per token
_HALO = 2.2  # points of white around labels

Point = tuple[float, float]
"""MiB and ΔNLL."""


def ladder_tables(data: Ladder) -> list[TitledTable]:
    """All tables there are rows for."""
    tables = []
    if data.outside:
        title = "What others offer at the same bytes"
        tables.append(TitledTable(_outside_table(data.outside), title, OUTSIDE_CAPTION))
    if data.shipped:
        table = _shipped_table(data.shipped)
        tables.append(TitledTable(table, "One level everywhere, in two models", SHIPPED_CAPTION))
    if data.fractions:
        title = "Removal alone, and the ladder"
        tables.append(TitledTable(_policy_table(data), title, POLICY_CAPTION))
    if data.settings:
        settings = {(r.name, r.shape): r for r in data.plans if r.method == "uniform"}
        labels = {name: data.label(name) for name in data.settings}
        table = _by_shape("Weights / caches", labels, settings)
        tables.append(TitledTable(table, "Uniform settings", UNIFORM_CAPTION))
    if data.llama_cpp:
        rows = {(row.cache, row.shape): row for row in data.llama_cpp}
        table = _by_shape("llama.cpp's cache", {cache: cache for cache, _ in rows}, rows)
        tables.append(TitledTable(table, "llama.cpp", LLAMA_CPP_CAPTION))
    return tables


def _by_shape(
    corner: str, labels: dict[str, str], rows: Mapping[tuple[str, Shape], LadderRow | LlamaCppRow]
) -> Table:
    """ΔNLL of each setting, and its bytes for each request."""
    shapes = list(dict.fromkeys(shape for _, shape in rows))
    lines = []
    for name, label in labels.items():
        sizes = []
        for shape in shapes:
            row = rows[name, shape]
            resident = f" ({_mib(row.resident_bytes)})" if isinstance(row, LlamaCppRow) else ""
            sizes.append(f"{_mib(row.held_bytes)}{resident}")
        lines.append([label, nats(rows[name, shapes[0]]), *sizes])
    return [corner, "ΔNLL", *(f"{shape_words(shape)}, MiB" for shape in shapes)], lines


def _shipped_table(rows: Sequence[ShippedRow]) -> Table:
    """Bytes and ΔNLL of each level everywhere, for each model."""
    by_level = {(row.source, row.lowered): row for row in rows}
    columns: dict[str, tuple[tuple[str, str], Callable[[ShippedRow], str]]] = {}
    for source in dict.fromkeys(row.source for row in rows):
        columns[f"{source[0]} ({source[1]}), MiB"] = (
            source,
            lambda row: f"{row.lowered_bytes / 2**20:.1f}" if row.lowered_bytes else "-",
        )
        columns[f"{source[0]}, ΔNLL"] = source, nats
    return crossed_table(
        "Lowered everywhere",
        {f"{k[0]} {k[1]}{_ROUNDINGS.get(k[2], '')}": k for _, k in by_level},
        columns,
        lambda lowered, column: (
            column[1](by_level[column[0], lowered]) if (column[0], lowered) in by_level else "-"
        ),
    )


def _policy_table(data: Ladder) -> Table:
    lines = []
    for shape in data.shapes:
        for fraction in data.fractions:
            rows = [data.policy_row(name, shape, fraction) for name in ("removal", "knapsack")]
            measured = [row for row in rows if row]
            if measured:
                shown = [f"{nats(row)}{'' if row.fits else ' *'}" if row else "-" for row in rows]
                budget = _mib(measured[0].budget_bytes or 0)
                lines.append([shape_words(shape), percent(fraction, 0), budget, *shown])
    return ["Request", "Budget", "MiB", "Removal alone", "Knapsack over levels"], lines


def _outside_table(rows: Sequence[OutsideRow]) -> Table:
    return columns_table(
        sorted(rows, key=lambda row: -row.weight_bytes),
        {
            "Method": lambda row: f"{OUTSIDE[row.method][0]}: {row.name}",
            "MiB": lambda row: f"{row.weight_bytes / 2**20:.1f}",
            "ΔNLL": nats,
            "KL": lambda row: f"{row.kl_divergence_mean:.4f}",
            "KL, 99 %": lambda row: f"{row.kl_divergence_p99:.3f}",
            "Same top token": lambda row: percent(row.same_top_token_share),
            "Types": lambda row: ", ".join(
                f"{count} {kind}" for kind, count in row.tensor_types.items() if kind != "f32"
            ),
        },
    )


def nats(row: LossRecord) -> str:
    """Format a ΔNLL with its interval, with four decimals where it is small."""
    digits = 4 if abs(row.loss) < 0.01 else 3
    return f"{row.loss:.{digits}f} [{row.loss_ci_low:.{digits}f}, {row.loss_ci_high:.{digits}f}]"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def loss_against_bytes(data: Ladder) -> Figure:
    """ΔNLL over bytes of weights and cache, a panel for each request, everything labelled."""
    parts = [
        Panel(
            partial(_draw_request, data, shape),
            f"{shape_words(shape)} tokens",
            "weights and KV cache (MiB, log scale)",
            "ΔNLL (nats/token)",
        )
        for shape in data.shapes
    ]
    return panel_figure(parts, columns=2, height=3.3, legend=0, same_axes=True, sharey=True)


def loss_at_equal_bytes(data: Ladder) -> Figure:
    """ΔNLL over bytes of all weights: this package's levels and plans beside what others offer."""
    panel = Panel(
        partial(_draw_outside, data.outside), "", "weights (MiB)", "ΔNLL (nats/token)"
    )  # fmt: skip
    return panel_figure([panel], columns=1, height=4.2, legend=3)


def _draw_outside(rows: Sequence[OutsideRow], axis: Axes) -> None:
    for method, (label, colour, marker) in OUTSIDE.items():
        own = sorted((row for row in rows if row.method == method), key=lambda r: r.weight_bytes)
        named = method in ("uniform", "llama.cpp")
        axis.plot(
            [row.weight_bytes / 2**20 for row in own], [row.loss for row in own], label=label,
            color=colour, marker=marker, markersize=4.5, linewidth=0 if named else 1.3,
            zorder=6 if named else 4,
        )  # fmt: skip
        for row in own if named else ():
            point = row.weight_bytes / 2**20, row.loss
            ffn = row.name.startswith("FFN")
            left = not ffn and (method == "uniform" or row.name.endswith("embeddings"))
            _label(axis, point, row.name, colour, above=ffn, left=left)
    _scale(axis)
    axis.set_xscale("linear")
    axis.set_ylim(-_LINEAR, 2 * max(row.loss for row in rows))


def pareto(rows: Sequence[LadderRow]) -> list[LadderRow]:
    """Those rows than which no other row has fewer bytes and a lower loss, the largest first."""
    best: list[LadderRow] = []
    for row in sorted(rows, key=lambda row: (row.held_bytes, row.loss)):
        if not best or row.loss < best[-1].loss:
            best.append(row)
    return best[::-1]


def named(uniform: Sequence[LadderRow]) -> list[LadderRow]:
    """Settings that get a label: the unquantised one, and those of the front that clearly differ.

    A larger setting must lower the loss by a fifth, and by more than `_LEAST_GAIN`.
    """
    differing: list[LadderRow] = []
    for row in reversed(pareto(uniform)):
        if not differing or row.loss < 0.8 * differing[-1].loss - _LEAST_GAIN:
            differing.append(row)
    native = [r for r in uniform if not r.levels and not r.packed and r not in differing]
    return [*native, *reversed(differing)]


def _draw_request(data: Ladder, shape: Shape, axis: Axes) -> None:
    uniform = data.at("uniform", shape)
    native = [row for row in uniform if not row.levels and not row.packed]
    lines = (("removal", REMOVAL, "blocks removed"), ("knapsack", KNAPSACK, "knapsack over levels"))
    for method, colour, words in lines:
        rows = [row for row in data.at(method, shape) if row.fits]
        if rows:
            points = _points([*native, *rows])
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5,
                      linewidth=1.5, zorder=4)  # fmt: skip
            _label(axis, points[-1], words, colour, above=method == "removal", bold=True)
    axis.plot(*zip(*_points(uniform), strict=True), "s", color=UNIFORM, markersize=3.5, zorder=5)
    for row in named(uniform):
        unquantised = not row.levels and not row.packed
        _label(axis, _points([row])[0], data.label(row.name), INK, above=True, left=unquantised)
    labelled: LlamaCppRow | None = None
    for cached in sorted(data.llama_cpp, key=lambda row: row.held_bytes):
        if cached.shape != shape:
            continue
        (point,) = _points([cached])
        axis.plot(*point, "D", color=LLAMA, markersize=4, zorder=6)
        # Labels of points that nearly coincide would hide each other.
        if labelled is None or cached.loss < labelled.loss / 1.5:
            _label(axis, point, cached.cache, LLAMA, above=labelled is None)
            labelled = cached
    _scale(axis)


def _points(rows: Sequence[LadderRow] | Sequence[LlamaCppRow]) -> list[Point]:
    return [(row.held_bytes / 2**20, row.loss) for row in rows]


def _label(
    axis: Axes, point: Point, text: str, colour: str, *, above: bool, bold: bool = False,
    left: bool = False,
) -> None:  # fmt: skip
    """Write a label beside a point, readable on lines."""
    from matplotlib.patheffects import withStroke

    axis.annotate(
        text, point, xytext=(-4 if left else 4, 4 if above else -4),
        textcoords="offset points", ha="right" if left else "left",
        fontsize=7.5 if bold else 6.5, color=colour, fontweight="bold" if bold else "normal",
        va="bottom" if above else "top", zorder=8,
        path_effects=[withStroke(linewidth=_HALO, foreground="white")],
    )  # fmt: skip


def _scale(axis: Axes) -> None:
    """A logarithmic axis of bytes, and one of ΔNLL that is linear near zero."""
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        NullFormatter,
        NullLocator,
    )

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yscale("symlog", linthresh=_LINEAR, linscale=0.5)
    axis.yaxis.set_major_locator(FixedLocator(_TICKS))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(0, color=FAINT, linewidth=0.7)

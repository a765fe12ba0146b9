"""Tables of what stubs recover."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.repair.rows import RepairComparison, RepairRow, mean_delta_nll
from experiments.study.looks import look
from experiments.study.statistics import Estimate
from experiments.study.tables import (
    Table,
    TitledTable,
    mebibytes,
    number,
    percent,
    shape_words,
)
from rap_env.errors import counted

ARROW = " \N{RIGHTWARDS ARROW} "


def repair_tables(data: RepairComparison) -> list[TitledTable]:
    """Every table that there are rows for."""
    tables = [
        TitledTable(_summary_table(data), caption=_summary_caption(data)),
        TitledTable(_grid_table(data), "ΔNLL at each request and budget", _grid_caption(data)),
        TitledTable(_accuracy_table(data), "Accuracy of each task, mean over the cells"),
    ]
    return [part for part in tables if part.table[1]]


def _summary_table(data: RepairComparison) -> Table:
    """One row per repair: mean ΔNLL and ratio on texts of fitted domains and on others."""
    header = ["Repair", "ΔNLL, fitted", "Ratio", "ΔNLL, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    lines = []
    for repair in data.repairs:
        line = [look(repair).label]
        for other in (False, True):
            rows = data.on(repair, other=other)
            delta_nll = mean_delta_nll(rows)
            line += [f"{delta_nll.mean:.3f}" if delta_nll else "-", _ratio(data.ratio(rows))]
        by_cell = {row.cell: row for row in data.of(repair)}
        means = [
            sum(row.accuracies.values()) / len(row.accuracies)
            for row in by_cell.values()
            if row.accuracies
        ]
        fitting = sum(row.peak_bytes <= row.budget_bytes for row in by_cell.values())
        line += [
            percent(sum(means) / len(means) if means else None),
            number(max(row.fit_tokens for row in by_cell.values())), f"{fitting}/{len(by_cell)}",
        ]  # fmt: skip
        lines.append(line)
    return header, lines


def _summary_caption(data: RepairComparison) -> str:
    windows = sum({row.text: len(row.window_losses) for row in data.rows}.values())
    cells, texts = counted(len(data.cells), "cell"), counted(len(data.texts), "text")
    return (
        f"Mean ΔNLL in nats/token over {cells} (a request at a budget) and {texts}. Fitted: "
        "held-out text of the domains that stubs "
        "were fitted on; other: texts of other domains. Ratio: mean ΔNLL divided by that without "
        "stubs; lower is better, 1 means no recovery. Intervals are 95 % percentile bootstrap over "
        f"{windows} windows of report text, resampled jointly for both values of a ratio. Tokens: "
        "tokens that stubs were fitted on. Fits: masks within their budget."
    )


def _grid_table(data: RepairComparison) -> Table:
    """One line per request and budget: ΔNLL of all repairs on each text, and removed blocks."""
    labels = [f"{t} (not fitted on)" if data.is_other(t) else t for t in data.texts]
    lines = []
    for cell in data.cells:
        by_text = [[data.at(repair, cell, text) for repair in data.repairs] for text in data.texts]
        # The mask is the same on all texts.
        by_repair = [next(filter(None, rows), None) for rows in zip(*by_text, strict=True)]
        size = next(row.budget_bytes for row in by_repair if row)
        lines.append([
            shape_words(cell),
            f"{percent(cell[2], 0)} ({mebibytes(size)})",
            *(_chain([f"{row.loss:.2f}" if row else "-" for row in rows]) for rows in by_text),
            _chain([_removed(row) for row in by_repair]),
        ])  # fmt: skip
    return ["Request", "Budget", *labels, "Blocks removed"], lines


def _grid_caption(data: RepairComparison) -> str:
    chain = _chain([look(repair).label for repair in data.repairs])
    return (
        f"ΔNLL in nats/token; each cell holds: {chain}. Removed blocks (attn+ffn) are in the same "
        "order, given once if equal. Each repair has its own mask, found by greedy search at the "
        f"same budget, stubs included."
    )


def _accuracy_table(data: RepairComparison) -> Table:
    """Mean accuracy of each task over the cells; no rows without tasks."""
    rows = [row for row in data.rows if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    dense = [row.dense_accuracies for row in rows if row.dense_accuracies]
    measured = {"Dense model": dense[:1]} | {
        look(repair).label: list(
            {r.cell: r.accuracies for r in rows if r.repair == repair}.values()
        )
        for repair in data.repairs
    }
    lines = []
    for name, cells in measured.items():
        if cells:
            means = [sum(cell[task] for cell in cells) / len(cells) for task in tasks]
            lines.append([name, *map(percent, [*means, sum(means) / len(means)])])
    return ["Repair", *tasks, "mean"], lines


def _ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; the reference itself is 1 without an interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _chain(parts: Sequence[str]) -> str:
    """The common value of all repairs, or else their values in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"

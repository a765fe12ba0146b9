"""Tables from records: Markdown for files, aligned text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.comparison.labels import look, short_label
from experiments.comparison.statistics import Estimate
from experiments.comparison.summaries import REFERENCE, Cell, Comparison, Summary
from experiments.console import say
from rap_env.artifacts import atomic_write

TERMINAL_COLUMNS = 100
TABLES_FILE = "tables.md"

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def markdown(table: Table) -> str:
    """A table in Markdown; the first column is left-aligned, the others right."""
    header, rows = table
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]) + "\n"


def plain(table: Table) -> str:
    """A table as aligned text."""
    header, rows = table
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def wrapped(text: str) -> str:
    """Break text into lines for the terminal."""
    return textwrap.fill(text, TERMINAL_COLUMNS)


def publish_tables(folder: Path, in_markdown: str, in_terminal: str) -> None:
    """Write ``tables.md`` into a run folder, and print the terminal form.

    Raises:
        StorageFullError: The disk is full.
    """
    with atomic_write(folder / TABLES_FILE) as file:
        file.write(in_markdown.encode())
    say(in_terminal)


def summary_table(comparison: Comparison) -> Table:
    """One row a method: mean losses, accuracy if tasks were run, cost and fit over all cells."""
    columns: dict[str, Callable[[Summary], str]] = {
        "Method": _name,
        "Loss on held-out text": lambda s: str(s.loss),
        "On calibration text": lambda s: f"{s.loss_calibration:.3f}",
        "Accuracy": lambda s: percent(s.accuracy),
        "Evaluations": lambda s: number(s.evaluations),
        "Decision": lambda s: seconds(s.decision_s),
        "Fits": lambda s: f"{s.fitting}/{s.rows}",
    }
    if all(summary.accuracy is None for summary in comparison.summaries):
        del columns["Accuracy"]
    rows = [[cell(summary) for cell in columns.values()] for summary in comparison.summaries]
    return list(columns), rows


def costs_table(comparison: Comparison) -> Table:
    """What each method costs: once, and for each request."""
    header = ["Method", "How it chooses", "KV-aware", "Evaluations once", "Training",
              "Evaluations a request", "Decision (median)"]  # fmt: skip
    rows = [
        [
            look(s.method).label, look(s.method).what, "yes" if s.kv_aware else "no",
            f"{s.setup_evaluations:,}", "-" if s.training_s is None else seconds(s.training_s),
            number(s.evaluations), seconds(s.decision_s),
        ]
        for s in comparison.summaries
    ]  # fmt: skip
    return header, rows


def loss_table(comparison: Comparison, shape: tuple[int, int]) -> Table:
    """Loss at each budget for one request: methods as rows, budgets as columns."""
    cells = [(*shape, budget) for budget in comparison.budgets]
    cells = [cell for cell in cells if any(comparison.at(m, cell) for m in comparison.compared)]
    header = ["Method", *[f"{_budget(comparison, cell)}" for cell in cells]]
    rows = [
        [look(s.method).label, *[_cell_loss(comparison, s.method, cell) for cell in cells]]
        for s in comparison.summaries
    ]
    return header, rows


def removed_table(comparison: Comparison, shape: tuple[int, int]) -> Table:
    """Blocks removed (attn + ffn) and peak memory at each budget for one request."""
    cells = [(*shape, budget) for budget in comparison.budgets]
    cells = [cell for cell in cells if any(comparison.at(m, cell) for m in comparison.compared)]
    header = ["Method", *[f"{_budget(comparison, cell)}" for cell in cells]]
    rows = []
    for summary in comparison.summaries:
        entries = []
        for cell in cells:
            found = comparison.at(summary.method, cell)
            if not found:
                entries.append("")
                continue
            attn = sum(row.attn_removed for row in found) / len(found)
            ffn = sum(row.ffn_removed for row in found) / len(found)
            peak = max(row.peak_bytes for row in found)
            entries.append(f"{attn:.3g} + {ffn:.3g}, {mebibytes(peak)}")
        rows.append([look(summary.method).label, *entries])
    return header, rows


def accuracy_table(comparison: Comparison) -> Table | None:
    """Mean accuracy of each task over the grid, dense first and chance last; None without tasks."""
    tasks = sorted({task for row in comparison.rows for task in row.accuracies})
    if not tasks:
        return None
    header = ["Method", *tasks, "mean"]
    rows = []
    dense = [REFERENCE] if REFERENCE in comparison.methods else []
    for method in [*dense, *[s.method for s in comparison.summaries]]:
        found = [row for row in comparison.rows if row.method == method and row.accuracies]
        if method != REFERENCE:
            found = [row for row in found if row.cell in comparison.cells]
        if found:
            means = [sum(row.accuracies[t] for row in found) / len(found) for t in tasks]
            cells = [percent(mean) for mean in [*means, sum(means) / len(means)]]
            rows.append([look(method).label, *cells])
    chance = comparison.rows[0].provenance.get("depends_on", {}).get("tasks", {}).get("chance")
    if chance and set(tasks) <= set(chance):
        means = [chance[task] for task in tasks]
        rows.append(["Guessing", *map(percent, [*means, sum(means) / len(means)])])
    return header, rows


def terminal_text(comparison: Comparison) -> str:
    """The comparison for the terminal, at most 100 columns wide, with a legend."""
    tasks = {task for row in comparison.rows for task in row.accuracies}
    windows = len(comparison.rows[0].window_losses)
    shapes = ", ".join(f"{b}x{s}" for b, s in comparison.shapes)
    budgets = ", ".join(percent(b, 0) for b in comparison.budgets)
    accuracy = f"Accuracy: mean of {len(tasks)} tasks. " if tasks else ""
    common = f" (the {len(comparison.cells)} pairs that every method has)"
    common = common if comparison.incomplete else ""
    legend = (
        f"Loss: rise of the negative log-likelihood over the dense model, nats per token, on "
        f"{windows} windows that no method has seen; mean over requests {shapes} (batch x tokens) "
        f"and budgets {budgets} of the dense model's peak memory{common}, with a 95 % interval; "
        "less is better. Calibr.: the same on the calibration text, which a search may overfit. "
        f"{accuracy}Evals: masks run through the model "
        "to decide on one request. Fits: how many choices were within their budget; methods that "
        "miss some stand last, for their losses do not compare. (n): seeds."
    )
    return f"{plain(short_summary(comparison))}\n\n{wrapped(legend)}"


def short_summary(comparison: Comparison) -> Table:
    """The summary in fewer columns of text."""
    short = {"On calibration text": "Calibr.", "Evaluations": "Evals"}
    header, rows = summary_table(comparison)
    names = [_name(s, short_label(s.method)) for s in comparison.summaries]
    cells = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
    return [short.get(name, name) for name in header], cells


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def signed_percent(value: float, digits: int = 1) -> str:
    """A relative difference as per cent, with its sign."""
    return f"{100 * value:+.{digits}f} %"


def signed(found: Estimate) -> str:
    """A difference with its sign and interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def relative_words(found: Estimate | None) -> str:
    """A relative difference with its interval in per cent, or a dash."""
    if found is None:
        return "-"
    return f"{signed_percent(found.mean)} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def seconds(value: float) -> str:
    """A duration in ms, s or min."""
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def number(value: float) -> str:
    """A count, with a decimal only where it is a mean that needs one."""
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as "1 pair" or "4 pairs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def mebibytes(value: float) -> str:
    """Bytes as MiB, for people."""
    return f"{value / 2**20:,.0f} MiB"


def _name(summary: Summary, label: str = "") -> str:
    seeds = f" ({summary.loss.seeds})" if summary.loss.seeds > 1 else ""
    return f"{label or look(summary.method).label}{seeds}"


def _budget(comparison: Comparison, cell: Cell) -> str:
    row = next(row for row in comparison.rows if row.cell == cell)
    if row.sparsity is not None:
        return f"{percent(row.sparsity, 0)} sparsity ({mebibytes(row.budget_bytes)})"
    return f"{percent(cell[2], 0)} ({mebibytes(row.budget_bytes)})"


def _cell_loss(comparison: Comparison, method: str, cell: Cell) -> str:
    found = comparison.loss_at(method, cell)
    if found is None:
        return ""
    fits = all(row.fits for row in comparison.at(method, cell))
    return f"{found}{'' if fits else ' (does not fit)'}"

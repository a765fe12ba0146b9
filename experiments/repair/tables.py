"""Tables of what stubs win back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.comparison.formatting import (
    TIMES,
    Table,
    counted,
    look,
    markdown,
    mebibytes,
    number,
    percent,
)
from experiments.comparison.statistics import Estimate
from experiments.config.common import Cell
from experiments.repair.orders import ORDERS_CAPTION, orders_table
from experiments.repair.rows import RepairRow
from experiments.repair.summaries import RepairComparison

ARROW = " \N{RIGHTWARDS ARROW} "

SAME_MASKS = (
    "Each library is judged under the masks that the search with the whole library chose (but "
    "where own masks are stated), and compared, cell by cell, with removal without stubs under "
    "masks of its own search."
)
"""Caption of the studies of tokens and domains."""


def repair_summary_table(found: RepairComparison) -> Table:
    """One row a repair: mean loss and ratio on texts of fitted domains and on others."""
    header = ["Repair", "Loss, fitted", "Ratio", "Loss, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    rows = [
        [
            look(s.repair).label, _mean(s.fitted), repair_ratio(s.fitted_ratio), _mean(s.other),
            repair_ratio(s.other_ratio), percent(s.accuracy), number(s.fit_tokens),
            f"{s.fitting}/{s.cells}",
        ]
        for s in found.summaries
    ]  # fmt: skip
    return header, rows


def repair_grid_table(found: RepairComparison) -> Table:
    """A line a request and budget: losses of all repairs on each text, and removed blocks."""
    header = ["Request", "Budget", *[text_label(found, text) for text in found.texts],
              "Blocks removed"]  # fmt: skip
    rows = []
    for cell in found.cells:
        losses = [
            _chain([_row_loss(found.at(repair, cell, text)) for repair in found.repairs])
            for text in found.texts
        ]
        removed = _chain([_removed(_row_at(found, repair, cell)) for repair in found.repairs])
        rows.append([_request(cell), _budget(found, cell), *losses, removed])
    return header, rows


def repair_text_table(found: RepairComparison, text: str) -> Table:
    """Loss with its interval and peak memory on one text: requests as lines, repairs as columns."""
    header = ["Request", "Budget", *[look(repair).label for repair in found.repairs]]
    rows = [
        [
            _request(cell), _budget(found, cell),
            *[_loss_and_peak(found.at(repair, cell, text)) for repair in found.repairs],
        ]
        for cell in found.cells
    ]  # fmt: skip
    return header, rows


def repair_accuracy_table(found: RepairComparison) -> Table | None:
    """Mean accuracy of each task over the cells; None without tasks."""
    rows = [row for row in found.study("grid") if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    lines = []
    if tasks and set(tasks) <= found.dense_accuracies.keys():
        lines.append(["Dense model", *_accuracy_cells([found.dense_accuracies], tasks)])
    for repair in found.repairs:
        own = [row for row in rows if row.repair == repair and set(tasks) == set(row.accuracies)]
        cells = list({row.cell: row.accuracies for row in own}.values())
        if cells:
            lines.append([look(repair).label, *_accuracy_cells(cells, tasks)])
    return (["Repair", *tasks, "mean"], lines) if lines else None


def token_table(found: RepairComparison) -> Table | None:
    """Ratio to no stubs for each number of fitting tokens and text; None without that study."""
    rows = [[f"{count:,}", *_ratios(found, own)] for count, own in found.token_rows.items()]
    header = ["Fitting tokens", *[text_label(found, text) for text in found.texts]]
    return (header, rows) if rows else None


def domain_table(found: RepairComparison) -> Table | None:
    """Ratio to no stubs: texts fitted on as lines, reported on as columns; None without."""
    lines: dict[tuple[tuple[str, ...], int], list[RepairRow]] = {}
    for row in found.study("domain"):
        lines.setdefault((tuple(row.fitted_on), row.fit_tokens), []).append(row)
    if not lines:
        return None
    cells = {row.cell for row in found.study("domain")}
    for row in found.study("grid"):
        if row.repair == "library" and row.cell in cells:
            lines.setdefault((tuple(row.fitted_on), row.fit_tokens), []).append(row)
    for row in found.study("alone"):
        if row.cell in cells:
            own = (f"{'+'.join(row.fitted_on)}, own masks",)
            lines.setdefault((own, row.fit_tokens), []).append(row)
    header = ["Fitted on", "Tokens", *found.texts]
    rows = [
        [" + ".join(names), f"{count:,}", *_ratios(found, own)]
        for (names, count), own in lines.items()
    ]
    return header, rows


def goals_table(found: RepairComparison) -> Table | None:
    """Goals with what was reached; goals without rows are left out; None if all are."""
    alone = [row for row in found.study("alone") if row.fitted_on == ["self"]]
    alone = alone or [row for row in found.study("domain") if row.fitted_on == ["self"]]
    by_text = [found.ratio([row for row in alone if row.text == text]) for text in found.texts]
    known = [ratio for ratio in by_text if ratio]
    goals = [
        ("library against plain, texts not fitted on", 0.75, found.ratio_of("library", other=True)),
        ("distilled, texts not fitted on", 0.6, found.ratio_of("distilled", other=True)),
        ("library, held-out text of a fitted domain", 0.6, found.ratio_of("library", other=False)),
        ("fitted on self-written text alone, worst text", 0.8,
         max(known, key=lambda ratio: ratio.mean) if known else None),
    ]  # fmt: skip
    rows = [
        [
            goal,
            repair_ratio(reached),
            f"at most {target:g}",
            "yes" if reached.mean <= target else "no",
        ]
        for goal, target, reached in goals
        if reached
    ]
    return (["Goal", "Reached", "Target", "Met"], rows) if rows else None


def grid_caption(found: RepairComparison) -> str:
    """What the main table's chains of numbers are."""
    chain = _chain([look(repair).label for repair in found.repairs])
    own = "; stubs fitted per mask take the library's" if "per_mask" in found.repairs else ""
    return (
        f"Loss in nats per token over the dense model; in each place: {chain}. Blocks removed "
        "(attn+ffn) stand in the same order, once where all agree. Each repair has a mask of its "
        f"own, found by greedy search at the same budget, stubs counted{own}."
    )


def summary_caption(found: RepairComparison) -> str:
    """What the summary's numbers are."""
    windows = sum({row.text: len(row.window_losses) for row in found.rows}.values())
    over = f"{counted(len(found.cells), 'cell')} (a request at a budget) and "
    over += counted(len(found.texts), "text")
    if found.incomplete:
        over += f", as far as all repairs have them ({len(found.pairs)} of "
        over += f"{len(found.cells) * len(found.texts)} pairs)"
    return (
        f"Mean losses in nats per token over {over}. Fitted: held-out text of the kinds that "
        "stubs were fitted on; other: texts of kinds that they were not fitted on. Ratio: mean "
        "loss divided by that without stubs; less is better, 1 wins nothing back. Intervals are "
        f"95 % percentile bootstrap over {windows} windows of report text, drawn jointly for both "
        "losses of a ratio. Tokens: what stubs were fitted on. Fits: masks within their budget."
    )


def repair_markdown(found: RepairComparison, orders: Mapping[str, Any] | None = None) -> str:
    """Every table, for ``repair_tables.md``.

    Args:
        found: The rows.
        orders: GSI orders by repair, as `experiments.repair.orders.read_orders` gives them.
    """
    parts = ["# Repair\n"]
    if found.summaries:
        parts += [f"{summary_caption(found)}\n", markdown(repair_summary_table(found))]
    goals, tokens, domains = goals_table(found), token_table(found), domain_table(found)
    accuracy = repair_accuracy_table(found)
    if goals:
        parts += ["## Goals\n", markdown(goals)]
    if found.cells:
        title = "## Loss at each request and budget\n"
        parts += [title, f"{grid_caption(found)}\n", markdown(repair_grid_table(found))]
    if accuracy:
        parts += ["## Accuracy\n", markdown(accuracy)]
    if tokens:
        parts += ["## Ratio to no stubs against fitting tokens\n", f"{SAME_MASKS}\n",
                  markdown(tokens)]  # fmt: skip
    if domains:
        parts += ["## Ratio to no stubs, fitted on (lines) and reported on (columns)\n",
                  f"{SAME_MASKS}\n", markdown(domains)]  # fmt: skip
    ordered = orders_table(orders or {})
    if ordered:
        parts += ["## The order of importance, with stubs in place\n", f"{ORDERS_CAPTION}\n",
                  markdown(ordered)]  # fmt: skip
    for text in found.texts if found.cells else []:
        parts += [f"## Loss with interval and peak memory, {text_label(found, text)}\n",
                  markdown(repair_text_table(found, text))]  # fmt: skip
    return "\n".join(parts)


def repair_ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; that of a loss to itself needs no interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def text_label(found: RepairComparison, text: str) -> str:
    """The name of a report text, and whether it is of a kind that was not fitted on."""
    return f"{text} (not fitted on)" if found.is_other(text) else text


def _accuracy_cells(cells: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    """Mean accuracy of each task, and over all tasks."""
    means = [sum(cell[task] for cell in cells) / len(cells) for task in tasks]
    return [percent(mean) for mean in [*means, sum(means) / len(means)]]


def _ratios(found: RepairComparison, rows: Sequence[RepairRow]) -> list[str]:
    """Ratio to no stubs on each text."""
    by_text = [[row for row in rows if row.text == text] for text in found.texts]
    return [repair_ratio(found.ratio(own)) for own in by_text]


def _chain(parts: Sequence[str]) -> str:
    """What all repairs share once, else their parts in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _request(cell: Cell) -> str:
    return f"{cell[0]} {TIMES} {cell[1]:,}"


def _budget(found: RepairComparison, cell: Cell) -> str:
    size = next(row.budget_bytes for row in found.study("grid") if row.cell == cell)
    return f"{percent(cell[2], 0)} ({mebibytes(size)})"


def _mean(loss: Estimate | None) -> str:
    return f"{loss.mean:.3f}" if loss else "-"


def _row_loss(row: RepairRow | None) -> str:
    return f"{row.loss:.2f}" if row else "-"


def _row_at(found: RepairComparison, repair: str, cell: Cell) -> RepairRow | None:
    """The row on any text: a mask is the same on all of them."""
    rows = [found.at(repair, cell, text) for text in found.texts]
    return next((row for row in rows if row), None)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"


def _loss_and_peak(row: RepairRow | None) -> str:
    if not row:
        return ""
    loss = Estimate(row.loss, row.loss_ci_low, row.loss_ci_high)
    misses = " (does not fit)" if row.peak_bytes > row.budget_bytes else ""
    return f"{loss}, {mebibytes(row.peak_bytes)}{misses}"

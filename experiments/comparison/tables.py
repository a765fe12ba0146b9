"""Tables of a comparison, for Markdown files and the terminal."""

from __future__ import annotations

from collections.abc import Callable

from experiments.comparison.formatting import (
    Table,
    look,
    markdown,
    mebibytes,
    number,
    percent,
    plain,
    relative_words,
    seconds,
    short_label,
    signed,
    wrapped,
)
from experiments.comparison.pairwise import PairwiseComparison, pairwise_comparisons, targets_table
from experiments.comparison.summaries import REFERENCE, Comparison, Summary
from experiments.config.common import Cell

PART_TITLES = {
    "sparsity": "At fixed sparsity",
    "outside": "Outside the training range of policies",
}

PART_CAPTIONS = {
    "sparsity": (
        "Budgets that require a share of the block weights to be freed, at a short request, where "
        "nearly all freed bytes are weights: a share of the parameters without embeddings and head."
    ),
    "outside": (
        "Requests or budgets that occur in no policy's training: longer sequences, larger batches "
        "or smaller budgets."
    ),
}

COUNTS_CAPTION = (
    "Better / even / worse (+/=/-): pairs of request and budget at which the 95 % interval of the "
    "difference is below 0, contains 0, or is above it. Relative: mean ΔNLL divided by that of the "
    "other method, minus 1. Verdict: the same for the mean over all pairs; *: the other method "
    "misses budgets, so its ΔNLL is not comparable."
)

HOLM_CAPTION = "By Holm: the same counts if all pairs are tested together at a level of 5 %."


def summary_table(comparison: Comparison) -> Table:
    """Return ΔNLL, accuracy (if measured), cost and fit of each method over all cells."""
    columns: dict[str, Callable[[Summary], str]] = {
        "Method": _name,
        "ΔNLL on held-out text": lambda s: str(s.delta_nll),
        "On calibration text": lambda s: f"{s.delta_nll_calibration:.3f}",
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
    """Return the cost of each method: once, and for each request."""
    header = ["Method", "How it chooses", "KV-aware", "Evaluations once", "Training",
              "Evaluations per request", "Decision (median)"]  # fmt: skip
    rows = [
        [
            look(s.method).label, look(s.method).what, "yes" if s.kv_aware else "no",
            f"{s.setup_evaluations:,}", "-" if s.training_s is None else seconds(s.training_s),
            number(s.evaluations), seconds(s.decision_s),
        ]
        for s in comparison.summaries
    ]  # fmt: skip
    return header, rows


def delta_nll_table(comparison: Comparison, shape: tuple[int, int]) -> Table:
    """Return ΔNLL in nats/token for one request: methods as rows, budgets as columns."""
    return _budget_table(comparison, shape, _delta_nll)


def removed_table(comparison: Comparison, shape: tuple[int, int]) -> Table:
    """Return removed blocks (attn + ffn) and peak memory for one request."""
    return _budget_table(comparison, shape, _removed)


def _budget_table(
    comparison: Comparison,
    shape: tuple[int, int],
    entry: Callable[[Comparison, str, Cell], str],
) -> Table:
    cells = [(*shape, budget) for budget in comparison.budgets]
    cells = [cell for cell in cells if any(comparison.at(m, cell) for m in comparison.compared)]
    header = ["Method", *[_budget(comparison, cell) for cell in cells]]
    rows = [
        [
            look(s.method).label,
            *[entry(comparison, s.method, cell) if comparison.at(s.method, cell) else ""
              for cell in cells],
        ]
        for s in comparison.summaries
    ]  # fmt: skip
    return header, rows


def _delta_nll(comparison: Comparison, method: str, cell: Cell) -> str:
    fits = all(row.fits for row in comparison.at(method, cell))
    return f"{comparison.delta_nll_at(method, cell)}{'' if fits else ' (does not fit)'}"


def _removed(comparison: Comparison, method: str, cell: Cell) -> str:
    found = comparison.at(method, cell)
    attn = sum(row.attn_removed for row in found) / len(found)
    ffn = sum(row.ffn_removed for row in found) / len(found)
    return f"{attn:.3g} + {ffn:.3g}, {mebibytes(max(row.peak_bytes for row in found))}"


def accuracy_table(comparison: Comparison) -> Table | None:
    """Return the accuracy of each task over the grid, dense first, chance last; None without."""
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
    """Return the summary for the terminal, at most 100 columns wide, with a legend."""
    tasks = {task for row in comparison.rows for task in row.accuracies}
    windows = len(comparison.rows[0].window_losses)
    shapes = ", ".join(f"{b}x{s}" for b, s in comparison.shapes)
    budgets = ", ".join(percent(b, 0) for b in comparison.budgets)
    accuracy = f"Accuracy: mean of {len(tasks)} tasks. " if tasks else ""
    common = f" (the {len(comparison.cells)} pairs that every method has)"
    common = common if comparison.incomplete else ""
    legend = (
        f"ΔNLL: increase of the negative log-likelihood over the dense model, nats per token, on "
        f"{windows} windows that no method has used; mean over requests {shapes} (batch x tokens) "
        f"and budgets {budgets} of the dense model's peak memory{common}, with a 95 % interval; "
        "lower is better. Calibr.: the same on the calibration text, which a search may overfit. "
        f"{accuracy}Evals: masks scored by the model for one request. Fits: number of masks within "
        "their budget; methods that miss budgets are listed last, because their ΔNLL is not "
        "comparable. (n): seeds."
    )
    return f"{plain(short_summary(comparison))}\n\n{wrapped(legend)}"


def short_summary(comparison: Comparison) -> Table:
    """Return the summary with shorter headings and labels."""
    short = {"On calibration text": "Calibr.", "Evaluations": "Evals"}
    header, rows = summary_table(comparison)
    names = [_name(s, short_label(s.method)) for s in comparison.summaries]
    cells = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
    return [short.get(name, name) for name in header], cells


def _name(summary: Summary, label: str = "") -> str:
    seeds = f" ({summary.delta_nll.seeds})" if summary.delta_nll.seeds > 1 else ""
    return f"{label or look(summary.method).label}{seeds}"


def _budget(comparison: Comparison, cell: Cell) -> str:
    row = next(row for row in comparison.rows if row.cell == cell)
    if row.sparsity is not None:
        return f"{percent(row.sparsity, 0)} sparsity ({mebibytes(row.budget_bytes)})"
    return f"{percent(cell[2], 0)} ({mebibytes(row.budget_bytes)})"


def difference_table(comparison: Comparison, method: str) -> Table:
    """Return the ΔNLL of a method minus that of each other, paired over windows."""
    header = ["Compared with", "Difference in ΔNLL (nats/token)", "Relative",
              "Better / even / worse", "By Holm", "Verdict"]  # fmt: skip
    rows = [_difference_row(found) for found in pairwise_comparisons(comparison, method)]
    return header, rows


def short_differences(comparison: Comparison, method: str) -> Table:
    """Return the differences for the terminal, at most 100 columns wide: without Holm counts."""
    header = ["Compared with", "Difference", "Relative", "+/=/-", "Verdict"]
    rows = []
    for found in pairwise_comparisons(comparison, method):
        _, difference, relative, cells, _, verdict = _difference_row(found)
        rows.append([short_label(found.other), difference, relative, cells, verdict])
    return header, rows


def tables_markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """Return all tables as Markdown, for ``tables.md``."""
    parts = [f"# {title}\n", *_part_tables(comparison)]
    targets = targets_table(comparison)
    if targets:
        parts += ["## Targets\n", markdown(targets)]
    accuracy = accuracy_table(comparison)
    if accuracy:
        parts += ["## Accuracy\n", markdown(accuracy)]
    parts += ["## Costs\n", markdown(costs_table(comparison))]
    for part, heading in PART_TITLES.items():
        other = comparison.other_part(part)
        if other:
            parts += [f"# {heading}\n", *_part_tables(other)]
    return "\n".join(parts)


def _part_tables(comparison: Comparison) -> list[str]:
    parts = [markdown(summary_table(comparison))]
    for method in comparison.learned:
        if method in {s.method for s in comparison.summaries}:
            parts += [f"## {look(method).label} minus each other method\n",
                      markdown(difference_table(comparison, method))]  # fmt: skip
    for shape in comparison.shapes:
        title = f"{shape[0]} x {shape[1]} tokens"
        parts += [f"## ΔNLL, {title}\n", markdown(delta_nll_table(comparison, shape)),
                  f"## Blocks removed (attn + ffn) and peak memory, {title}\n",
                  markdown(removed_table(comparison, shape))]  # fmt: skip
    return parts


def _difference_row(found: PairwiseComparison) -> list[str]:
    return [
        look(found.other).label, signed(found.difference), relative_words(found.relative),
        str(found.cells), str(found.corrected),
        found.verdict if found.other_fits else f"{found.verdict}*",
    ]  # fmt: skip

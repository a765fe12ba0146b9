"""Tables of a comparison, for Markdown files and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from experiments.comparison.result_rows import ResultRow
from experiments.comparison.summaries import (
    REFERENCE,
    Comparison,
    PairwiseComparison,
    Summary,
    pairwise_comparisons,
)
from experiments.config.common import Cell, Shape
from experiments.study.plotting import look
from experiments.study.statistics import bootstrap_mean, mean_of_known, paired_ratio
from experiments.study.table_format import (
    TitledTable,
    columns_table,
    crossed_table,
    document,
    mebibytes,
    number,
    percent,
    relative_words,
    seconds,
    shape_words,
    signed,
)

COUNTS_CAPTION = (
    "Better / even / worse (+/=/-): pairs of request and budget at which the 95 % interval of the "
    "difference is below 0, contains 0, or is above it. Relative: mean ΔNLL divided by that of the "
    "other method, minus 1. Verdict: the same for the mean over all pairs; *: the other method "
    "misses budgets, so its ΔNLL is not comparable."
)

HOLM_CAPTION = "By Holm: the same counts if all pairs are tested together at a level of 5 %."


def summary_table(comparison: Comparison) -> pd.DataFrame:
    """Return ΔNLL, accuracy (if measured), cost and fit of each method over all cells."""
    columns: dict[str, Callable[[Summary], str]] = {
        "Method": lambda s: s.label,
        "ΔNLL on held-out text": lambda s: str(s.delta_nll),
        "On calibration text": lambda s: f"{s.delta_nll_calibration:.3f}",
        "Accuracy": lambda s: percent(s.accuracy),
        "Evaluations": lambda s: number(s.evaluations),
        "Decision": lambda s: seconds(s.decision_s),
        "Fits": lambda s: f"{s.fitting}/{s.rows}",
    }
    if all(summary.accuracy is None for summary in comparison.summaries):
        del columns["Accuracy"]
    return columns_table(comparison.summaries, columns)


QUALITY_HEADERS = {
    "kl_divergence_mean": "KL divergence",
    "kl_divergence_p99": "99th percentile",
    "same_top_token_share": "Same top token",
    "flipped_answers_share": "Flipped answers",
    "accuracy_above_chance": "Accuracy above chance kept",
}
"""Headers of what is measured besides ΔNLL, by the name of the field in a row."""

QUALITY_CAPTION = (
    "KL divergence: of the next-token distribution from that of the native model, nats, mean over "
    "the tokens of the held-out text and 99th percentile. Same top token: share of tokens for "
    "which the most likely next token is that of the native model. Flipped answers: share of "
    "multiple-choice answers that became wrong or right. Accuracy above chance kept: (accuracy - "
    "chance) / (native accuracy - chance), mean over the tasks in which the native model is above "
    "chance, with a 95 % interval over documents."
)


def quality_table(comparison: Comparison) -> pd.DataFrame | None:
    """Return what separates the plans of each method from the native model; None if unmeasured."""
    lines = {s.label: s.quality for s in comparison.summaries}
    measured = set().union(*lines.values())
    columns = {header: name for name, header in QUALITY_HEADERS.items() if name in measured}
    return crossed_table("Method", lines, columns, quality_entry) if columns else None


def quality_entry(quality: dict[str, float], name: str) -> str:
    """Format a value of `ResultRow.quality`; a dash if it was not measured."""
    if name not in quality:
        return "-"
    if name.startswith("kl_divergence"):
        return f"{quality[name]:.3f}"
    if name != "accuracy_above_chance":
        return percent(quality[name])
    low, high = (100 * quality[f"{name}_ci_{end}"] for end in ("low", "high"))
    return f"{percent(quality[name])} [{low:.1f}, {high:.1f}]"


def costs_table(comparison: Comparison) -> pd.DataFrame:
    """Return the cost of each method before any request."""
    columns: dict[str, Callable[[Summary], str]] = {
        "Method": lambda s: look(s.method).label,
        "Evaluations": lambda s: f"{s.setup_evaluations:,}",
        "Training": lambda s: "-" if s.training_s is None else seconds(s.training_s),
    }
    return columns_table(comparison.summaries, columns)


def delta_nll_table(comparison: Comparison, shape: Shape) -> pd.DataFrame:
    """Return ΔNLL in nats/token for one request: methods as rows, budgets as columns."""

    def entry(method: str, cell: Cell) -> str:
        if not (rows := comparison.at(method, cell)):
            return ""
        mean = bootstrap_mean([row.window_delta_nll for row in rows])
        return f"{mean}{'' if all(row.fits for row in rows) else ' (does not fit)'}"

    cells = [(*shape, budget) for budget in comparison.budgets_of(shape)]
    cells = [cell for cell in cells if any(comparison.at(m, cell) for m in comparison.compared)]
    return crossed_table(
        "Method",
        {look(s.method).label: s.method for s in comparison.summaries},
        {_budget(comparison, cell): cell for cell in cells},
        entry,
    )


def accuracy_table(comparison: Comparison) -> pd.DataFrame | None:
    """Return the accuracies of each task over the grid, native first, chance last; None without.

    Tasks have a column for ``acc`` and, if it was measured, one for ``acc_norm``. The mean is
    that of ``acc``.
    """
    tasks = sorted({task for row in comparison.rows for task in row.accuracies})
    if not tasks:
        return None
    normed = {task for row in comparison.rows for task in row.accuracies_norm or {}}
    columns = [(t, m) for t in tasks for m in ("acc", "acc_norm") if m == "acc" or t in normed]
    names = [f"{task} {metric}" if normed else task for task, metric in columns]
    rows = []
    reference = [REFERENCE] if REFERENCE in comparison.methods else []
    for method in [*reference, *[s.method for s in comparison.summaries]]:
        scored = [row for row in comparison.rows if row.method == method and row.accuracies]
        if method != REFERENCE:
            scored = [row for row in scored if row.cell in comparison.cells]
        if scored:
            means = [_mean_accuracy(scored, *column) for column in columns]
            whole = mean_of_known(_mean_accuracy(scored, task, "acc") for task in tasks)
            rows.append([look(method).label, *map(percent, means), percent(whole)])
    chance = comparison.rows[0].depends_on.get("tasks", {}).get("chance")
    if chance and set(tasks) <= set(chance):
        guesses = [chance[task] for task, _ in columns]
        whole = mean_of_known(chance[task] for task in tasks)
        rows.append(["Guessing", *map(percent, guesses), percent(whole)])
    header = ["Method", *names, "mean acc" if normed else "mean"]
    return pd.DataFrame(rows, columns=header)


def _mean_accuracy(rows: Sequence[ResultRow], task: str, metric: str) -> float | None:
    """Mean over rows of an accuracy of a task; None if no row has it."""
    by_row = [row.accuracies if metric == "acc" else row.accuracies_norm or {} for row in rows]
    return mean_of_known(accuracies[task] for accuracies in by_row if task in accuracies)


def _budget(comparison: Comparison, cell: Cell) -> str:
    row = next(row for row in comparison.rows if row.cell == cell)
    if row.target_delta_nll is not None:
        return f"about {row.target_delta_nll:g} ({mebibytes(row.budget_bytes)})"
    return f"{percent(cell[2], 0)} ({mebibytes(row.budget_bytes)})"


def difference_table(comparison: Comparison, method: str) -> pd.DataFrame:
    """Return the ΔNLL of a method minus that of each other, paired over windows."""
    columns: dict[str, Callable[[PairwiseComparison], str]] = {
        "Compared with": lambda pair: look(pair.other).label,
        "Difference in ΔNLL (nats/token)": lambda pair: signed(pair.difference),
        "Relative": lambda pair: relative_words(pair.relative),
        "Better / even / worse": lambda pair: str(pair.cells),
        "By Holm": lambda pair: str(pair.corrected),
        "Verdict": lambda pair: pair.verdict if pair.other_fits else f"{pair.verdict}*",
    }
    return columns_table(pairwise_comparisons(comparison, method), columns)


def comparison_document(comparison: Comparison) -> list[TitledTable]:
    """Return all tables of a comparison."""
    tables = [TitledTable(summary_table(comparison))]
    if (quality := quality_table(comparison)) is not None:
        title = "Distance from the native model"
        tables.append(TitledTable(quality, title, QUALITY_CAPTION))
    methods = [summary.method for summary in comparison.summaries]
    learned = [name for name in methods if name in comparison.learned and len(methods) > 1]
    for method in learned:
        title = f"ΔNLL of {look(method).label} minus each other method, paired over windows"
        caption = f"{COUNTS_CAPTION} {HOLM_CAPTION}" if method == learned[-1] else ""
        tables.append(TitledTable(difference_table(comparison, method), title, caption))
    tables += tight_document(comparison)
    for shape in comparison.shapes:
        title = f"ΔNLL (nats/token), {shape_words(shape)} tokens"
        tables.append(TitledTable(delta_nll_table(comparison, shape), title))
    if (accuracy := accuracy_table(comparison)) is not None:
        tables.append(TitledTable(accuracy, "Accuracy of each task, mean over the grid"))
    return [*tables, TitledTable(costs_table(comparison), "Costs before any request")]


def tables_markdown(
    comparison: Comparison, title: str = "Comparison", *, captions: bool = False
) -> str:
    """Return all tables as Markdown, if asked to with the meaning of their numbers."""
    return f"# {title}\n\n{document(comparison_document(comparison), captions=captions)}"


RATIO_TO = ("uniform", "knapsack", "greedy_per_byte", "evolutionary", "beam")
"""Methods by whose ΔNLL that of each other method is divided."""

TARGET_CAPTION = (
    "About 0.1: budgets at which the best uniform setting loses about 0.1 nats per token on the "
    "calibration text; likewise the others."
)

RATIO_CAPTION = (
    "Geometric mean over the cells of a column of ΔNLL divided by that of the other method at the "
    "same budget, with a 95 % interval, paired over windows; below 1 is better. A dash: some ΔNLL "
    "is not significantly above 0, so that there is no ratio."
)


def _tight_columns(comparison: Comparison) -> dict[str, list[Cell]]:
    """The cells of each request, of each loss that budgets stand for, and all cells."""
    columns = {
        shape_words(shape): [cell for cell in comparison.cells if cell[:2] == shape]
        for shape in comparison.shapes
    }
    if len(comparison.cells) > len(comparison.shapes):  # else each request has one target
        columns |= {f"about {target:g}": cells for target, cells in comparison.targets.items()}
    return {**{name: cells for name, cells in columns.items() if cells}, "All": comparison.cells}


def target_table(comparison: Comparison) -> pd.DataFrame:
    """Return mean ΔNLL by request, and by the ΔNLL that budgets stand for."""
    return crossed_table(
        "Method",
        comparison.lines,
        _tight_columns(comparison),
        lambda method, cells: f"{comparison.summary(method, cells).delta_nll.mean:.3f}",
    )


def ratio_table(comparison: Comparison, other: str) -> pd.DataFrame:
    """Return ΔNLL divided by that of another method, by request and by target."""

    def entry(method: str, cells: list[Cell]) -> str:
        first, second = (
            [comparison.window_delta_nlls(name, cell) for cell in cells] for name in (method, other)
        )
        ratio = paired_ratio(first, second)
        return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "-"

    lines = {name: method for name, method in comparison.lines.items() if method != other}
    return crossed_table("Method", lines, _tight_columns(comparison), entry)


def tight_document(comparison: Comparison) -> list[TitledTable]:
    """Return the tables of a comparison whose budgets stand for losses; empty for others."""
    if not comparison.targets or not comparison.summaries:
        return []
    title = "Mean ΔNLL (nats/token) by request and by tightness"
    tables = [TitledTable(target_table(comparison), title, TARGET_CAPTION)]
    for other in RATIO_TO:
        if other in comparison.methods:
            title = f"ΔNLL divided by that of {look(other).label}"
            tables.append(TitledTable(ratio_table(comparison, other), title, RATIO_CAPTION))
    return tables

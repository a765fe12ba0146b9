"""Tables of one method against others, of the goals, and of cells beside the grid."""

from __future__ import annotations

from experiments.comparison.labels import look, short_label
from experiments.comparison.pairwise import Verdict, verdicts
from experiments.comparison.summaries import Comparison
from experiments.comparison.tables import (
    Table,
    accuracy_table,
    costs_table,
    loss_table,
    markdown,
    relative_words,
    removed_table,
    summary_table,
)
from experiments.comparison.targets import goals_table

PART_TITLES = {
    "sparsity": "At fixed sparsity",
    "outside": "Outside the range that policies were trained on",
}

PART_CAPTIONS = {
    "sparsity": (
        "Budgets that ask for a share of the block weights to be freed, at a short request, so "
        "that nearly all that is freed is weights: a share of the parameters, embeddings and head "
        "aside."
    ),
    "outside": (
        "Requests or budgets that no policy met in its training: longer, with a larger batch, or "
        "tighter."
    ),
}

COUNTS_CAPTION = (
    "Better / even / worse (+/=/-): pairs of request and budget at which the 95 % interval of the "
    "difference lies below 0, holds 0, or lies above it. Relative: mean loss divided by the "
    "other's, less 1. Verdict: the same for the mean over all pairs; *: the other misses budgets, "
    "so that its loss does not compare."
)

HOLM_CAPTION = "By Holm: the same counts where all pairs are tested together at a level of 5 %."


def difference_table(comparison: Comparison, method: str) -> Table:
    """Loss of one method minus each other's, paired over windows and seeds."""
    header = ["Compared with", "Difference (nats/token)", "Relative", "Better / even / worse",
              "By Holm", "Verdict"]  # fmt: skip
    rows = [_difference_row(found) for found in verdicts(comparison, method)]
    return header, rows


def short_differences(comparison: Comparison, method: str) -> Table:
    """The same for the terminal, at most 100 columns wide: without Holm's correction."""
    header = ["Compared with", "Difference", "Relative", "+/=/-", "Verdict"]
    rows = []
    for found in verdicts(comparison, method):
        _, difference, relative, cells, _, verdict = _difference_row(found)
        rows.append([short_label(found.other), difference, relative, cells, verdict])
    return header, rows


def tables_markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """Every table, for ``tables.md``."""
    parts = [f"# {title}\n", *_part_tables(comparison)]
    goals = goals_table(comparison)
    if goals:
        parts += ["## Goals\n", markdown(goals)]
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
        parts += [f"## Loss, {title}\n", markdown(loss_table(comparison, shape)),
                  f"## Blocks removed (attn + ffn) and peak memory, {title}\n",
                  markdown(removed_table(comparison, shape))]  # fmt: skip
    return parts


def _difference_row(found: Verdict) -> list[str]:
    mean, low, high = found.difference.mean, found.difference.low, found.difference.high
    return [
        look(found.other).label, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
        relative_words(found.relative), str(found.cells), str(found.corrected),
        found.word if found.other_fits else f"{found.word}*",
    ]  # fmt: skip

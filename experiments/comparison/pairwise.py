"""Pairwise comparisons of methods, and the targets that a policy should reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.comparison.summaries import Comparison, Summary
from experiments.study.looks import look
from experiments.study.records import Cell
from experiments.study.statistics import (
    Estimate,
    difference_p,
    holm,
    paired_difference,
    relative_difference,
)
from experiments.study.tables import Table, number, relative_words, signed_percent


class Counts(NamedTuple):
    """Numbers of cells at which the interval of the difference is below, around and above 0."""

    better: int
    even: int
    worse: int

    def __str__(self) -> str:
        return f"{self.better}/{self.even}/{self.worse}"


@dataclass(frozen=True)
class PairwiseComparison:
    """Difference in ΔNLL between two methods, paired over windows.

    Attributes:
        difference: Mean ΔNLL minus that of `other`, nats per token, with a 95 % interval.
        relative: The difference divided by the mean ΔNLL of `other`; None if that is not
            significantly above 0.
        cells: Counts of cells, each by its own 95 % interval.
        corrected: Counts of cells tested together at 5 % with Holm's correction.
        other_fits: Whether `other` met every budget.
    """

    other: str
    difference: Estimate
    relative: Estimate | None
    cells: Counts
    corrected: Counts
    other_fits: bool

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``even``, by the interval of the mean difference."""
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "even"


def pairwise_comparisons(comparison: Comparison, method: str) -> list[PairwiseComparison]:
    """Compare a method with every other one, in order of their mean ΔNLL."""
    others = [s.method for s in comparison.summaries if s.method != method]
    return [found for other in others if (found := compare_pair(comparison, method, other))]


def compare_pair(
    comparison: Comparison, method: str, other: str, cells: Sequence[Cell] | None = None
) -> PairwiseComparison | None:
    """Compare a method with another one over some cells (default: those that all methods have).

    Returns:
        The comparison; None if `other` was not measured or there are no cells.
    """
    cells = comparison.cells if cells is None else cells
    summary = next((s for s in comparison.summaries if s.method == other), None)
    if summary is None or not cells:
        return None
    one, two = comparison.window_means(method, cells), comparison.window_means(other, cells)
    pairs = [
        (comparison.window_delta_nlls(method, cell), comparison.window_delta_nlls(other, cell))
        for cell in cells
    ]
    differences = [paired_difference(*pair) for pair in pairs]
    rejected = holm([difference_p(*pair) for pair in pairs])
    return PairwiseComparison(
        other=other,
        difference=paired_difference(one, two),
        relative=relative_difference(one, two),
        cells=_counts(differences, [found.high < 0 or found.low > 0 for found in differences]),
        corrected=_counts(differences, rejected),
        other_fits=summary.fits_all,
    )


def _counts(differences: Sequence[Estimate], significant: Sequence[bool]) -> Counts:
    """Count cells by the sign of their difference where it is significant."""
    signs = [d.mean for d, counts in zip(differences, significant, strict=True) if counts]
    better = sum(sign < 0 for sign in signs)
    return Counts(better, len(differences) - len(signs), len(signs) - better)


WITHIN = {
    "uniform": -0.3,
    "knapsack": -0.05,
    "evolutionary": 0.02,
    "frontier": 0.02,
    "oracle": 0.03,
}
"""Targets for the relative difference to the mean ΔNLL of these methods, at most."""

COMPETING_GAIN = 0.1
"""Target for the relative reduction of the GSI order's ΔNLL where weights and cache compete."""

FASTER = 1000.0
"""Target for the ratio of decision times: greedy search to policy."""


def targets_table(comparison: Comparison) -> Table | None:
    """Return the targets with what the main policy reached; None if none was measured."""
    policy = comparison.main_policy
    if policy is None:
        return None
    rows = [*_against_gsi(comparison, policy), *_against_greedy(comparison, policy)]
    for other in WITHIN:
        rows += _within(comparison, policy, other)
    header = [f"Target of {look(policy.method).label}", "Reached", "Target value", "Met"]
    return (header, rows) if rows else None


def competing_cells(comparison: Comparison) -> list[Cell]:
    """Return the cells at which greedy search per byte removes blocks of both kinds.

    At these cells, weights compete with the KV cache; at others, removing one kind of block is
    clearly best.
    """
    return [
        cell
        for cell in comparison.cells
        if (rows := comparison.at("greedy_per_byte", cell))
        and all(row.attn_removed and row.ffn_removed for row in rows)
    ]


def _against_gsi(comparison: Comparison, policy: Summary) -> list[list[str]]:
    found = compare_pair(comparison, policy.method, "gsi")
    if not found:
        return []
    rows = [
        _row("mean ΔNLL below the GSI order", _relative(found), "interval below 0",
             found.difference.high < 0),
        _row("cells with higher ΔNLL than the GSI order", str(found.cells.worse), "none",
             found.cells.worse == 0),
    ]  # fmt: skip
    some = compare_pair(comparison, policy.method, "gsi", competing_cells(comparison))
    if some and some.relative:
        rows.append(
            _row("the same where weights and cache compete", relative_words(some.relative),
                 f"{signed_percent(-COMPETING_GAIN, 0)} or less",
                 some.relative.mean <= -COMPETING_GAIN)
        )  # fmt: skip
    return rows


def _against_greedy(comparison: Comparison, policy: Summary) -> list[list[str]]:
    found = compare_pair(comparison, policy.method, "greedy_per_byte")
    if not found:
        return []
    greedy = next(s for s in comparison.summaries if s.method == "greedy_per_byte")
    times = greedy.decision_s / max(policy.decision_s, 1e-9)
    return [
        _row("mean ΔNLL not above greedy per byte", _relative(found), "0 or less",
             found.difference.mean <= 0),
        _row("decision faster than greedy per byte", f"{number(times)} times",
             f"{number(FASTER)} times", times >= FASTER),
        _row("model evaluations for a decision", number(policy.evaluations), "none",
             policy.evaluations == 0),
    ]  # fmt: skip


def _within(comparison: Comparison, policy: Summary, other: str) -> list[list[str]]:
    found = compare_pair(comparison, policy.method, other)
    if not found or not found.relative:
        return []
    most = WITHIN[other]
    name = f"mean ΔNLL against {look(other).label}"
    target = f"{signed_percent(most, 0)} or less"
    return [_row(name, relative_words(found.relative), target, found.relative.mean <= most)]


def _relative(found: PairwiseComparison) -> str:
    return relative_words(found.relative) if found.relative else f"{found.difference} nats/token"


def _row(name: str, reached: str, target: str, met: bool) -> list[str]:
    return [name, reached, target, "yes" if met else "no"]

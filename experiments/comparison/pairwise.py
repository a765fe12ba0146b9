"""Pairwise comparisons of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.comparison.summaries import Comparison
from experiments.study.json_records import Cell
from experiments.study.statistics import (
    Estimate,
    difference_p,
    holm,
    paired_difference,
    relative_difference,
)


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
    return [pair for other in others if (pair := compare_pair(comparison, method, other))]


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
    first, second = (comparison.window_means(name, cells) for name in (method, other))
    pairs = [
        (comparison.window_delta_nlls(method, cell), comparison.window_delta_nlls(other, cell))
        for cell in cells
    ]
    differences = [paired_difference(*pair) for pair in pairs]
    rejected = holm([difference_p(*pair) for pair in pairs])
    return PairwiseComparison(
        other=other,
        difference=paired_difference(first, second),
        relative=relative_difference(first, second),
        cells=_counts(differences, [d.high < 0 or d.low > 0 for d in differences]),
        corrected=_counts(differences, rejected),
        other_fits=summary.fits_all,
    )


def _counts(differences: Sequence[Estimate], significant: Sequence[bool]) -> Counts:
    """Count cells by the sign of their difference where it is significant."""
    signs = [d.mean for d, counts in zip(differences, significant, strict=True) if counts]
    better = sum(sign < 0 for sign in signs)
    return Counts(better, len(differences) - len(signs), len(signs) - better)

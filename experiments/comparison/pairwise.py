"""One method against another: in the mean, in proportion, and at each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.comparison.statistics import (
    Estimate,
    difference_p,
    holm,
    paired_difference,
    relative_difference,
)
from experiments.comparison.summaries import Cell, Comparison


@dataclass(frozen=True)
class Counts:
    """Cells by what the difference of their losses says.

    Attributes:
        better: Cells at which the method loses less, the interval below 0.
        even: Cells without a clear difference.
        worse: Cells at which it loses more.
    """

    better: int
    even: int
    worse: int

    def __str__(self) -> str:
        return f"{self.better}/{self.even}/{self.worse}"


@dataclass(frozen=True)
class Verdict:
    """A method against another one, paired over windows.

    Attributes:
        method: The one that is judged.
        other: The one that it is compared with.
        difference: Mean loss less that of the other, nats per token, with a 95 % interval.
        relative: The same as a share of the other's mean loss; None where that is not above 0.
        cells: Counts of cells, each by its own 95 % interval.
        corrected: Counts of cells, all together at 5 % (Holm's correction).
        other_fits: Whether the other met every budget.
    """

    method: str
    other: str
    difference: Estimate
    relative: Estimate | None
    cells: Counts
    corrected: Counts
    other_fits: bool

    @property
    def word(self) -> str:
        """``better``, ``worse`` or ``even`` in the mean."""
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "even"


def verdicts(comparison: Comparison, method: str) -> list[Verdict]:
    """A method against each other one, those of the least loss first."""
    others = [s for s in comparison.summaries if s.method != method]
    return [_verdict(comparison, method, s.method, s.fits_all) for s in others]


def verdict_on(comparison: Comparison, method: str, other: str) -> Verdict | None:
    """A method against another; None if the other was not measured."""
    found = [s for s in comparison.summaries if s.method == other]
    return _verdict(comparison, method, other, found[0].fits_all) if found else None


def relative_on(
    comparison: Comparison, method: str, other: str, cells: Sequence[Cell]
) -> Estimate | None:
    """Mean loss over some cells, divided by the other's, less 1; None without cells."""
    if not cells:
        return None
    means = [comparison.window_means(name, cells) for name in (method, other)]
    return relative_difference(*means)


def _verdict(comparison: Comparison, method: str, other: str, fits: bool) -> Verdict:
    one, two = comparison.window_means(method), comparison.window_means(other)
    pairs = [
        (comparison.losses_at(method, cell), comparison.losses_at(other, cell))
        for cell in comparison.cells
    ]
    alone = [paired_difference(*pair) for pair in pairs]
    together = holm([difference_p(*pair) for pair in pairs])
    return Verdict(
        method=method,
        other=other,
        difference=paired_difference(one, two),
        relative=relative_difference(one, two),
        cells=_counts(alone, [found.high < 0 or found.low > 0 for found in alone]),
        corrected=_counts(alone, together),
        other_fits=fits,
    )


def _counts(differences: Sequence[Estimate], clear: Sequence[bool]) -> Counts:
    """Cells by the sign of their difference, where it is clear."""
    signs = [d.mean for d, is_clear in zip(differences, clear, strict=True) if is_clear]
    better = sum(sign < 0 for sign in signs)
    return Counts(better, len(differences) - len(signs), len(signs) - better)

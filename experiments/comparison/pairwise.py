"""One method against another: in the mean, in proportion, and at each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.comparison.formatting import Table, look, number, relative_words, signed_percent
from experiments.comparison.statistics import (
    Estimate,
    difference_p,
    holm,
    paired_difference,
    relative_difference,
)
from experiments.comparison.summaries import Comparison, Summary
from experiments.config.common import Cell


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
class PairwiseComparison:
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


def pairwise_comparisons(comparison: Comparison, method: str) -> list[PairwiseComparison]:
    """A method against each other one, those of the least loss first."""
    others = [s for s in comparison.summaries if s.method != method]
    return [_verdict(comparison, method, s.method, s.fits_all) for s in others]


def compare_pair(comparison: Comparison, method: str, other: str) -> PairwiseComparison | None:
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


def _verdict(comparison: Comparison, method: str, other: str, fits: bool) -> PairwiseComparison:
    one, two = comparison.window_means(method), comparison.window_means(other)
    pairs = [
        (comparison.losses_at(method, cell), comparison.losses_at(other, cell))
        for cell in comparison.cells
    ]
    alone = [paired_difference(*pair) for pair in pairs]
    together = holm([difference_p(*pair) for pair in pairs])
    return PairwiseComparison(
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


WITHIN = {"evolutionary": 0.02, "frontier": 0.02, "oracle": 0.03}
"""Share of these methods' mean loss that a policy may lose more than they do."""

COMPETING_GAIN = 0.1
"""Share of the GSI order's loss to be saved where weights and cache compete."""

FASTER = 1000.0
"""Times quicker than the greedy search that a decision is to be."""


def targets_table(comparison: Comparison) -> Table | None:
    """Goals with what the best learned method reached; None where no goal was measured."""
    policy = comparison.main_policy
    if policy is None:
        return None
    rows = [*_against_gsi(comparison, policy), *_against_greedy(comparison, policy)]
    for other in WITHIN:
        rows += _within(comparison, policy, other)
    header = [f"Goal of {look(policy.method).label}", "Reached", "Target", "Met"]
    return (header, rows) if rows else None


def competing_cells(comparison: Comparison) -> list[Cell]:
    """Cells at which the greedy search per byte removes blocks of both kinds.

    There the bytes of weights compete with those of the cache; elsewhere one kind of block is
    the only sensible choice, and little is left to decide.
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
        _row("loses less than the GSI order in the mean", _relative(found), "interval below 0",
             found.difference.high < 0),
        _row("loses more than the GSI order at no pair", f"at {found.cells.worse}", "at none",
             found.cells.worse == 0),
    ]  # fmt: skip
    some = relative_on(comparison, policy.method, "gsi", competing_cells(comparison))
    if some:
        rows.append(
            _row("the same where weights and cache compete", relative_words(some),
                 f"{signed_percent(-COMPETING_GAIN, 0)} or less", some.mean <= -COMPETING_GAIN)
        )  # fmt: skip
    return rows


def _against_greedy(comparison: Comparison, policy: Summary) -> list[list[str]]:
    found = compare_pair(comparison, policy.method, "greedy_per_byte")
    if not found:
        return []
    greedy = next(s for s in comparison.summaries if s.method == "greedy_per_byte")
    times = greedy.decision_s / max(policy.decision_s, 1e-9)
    return [
        _row("not above greedy per byte in the mean", _relative(found), "0 or less",
             found.difference.mean <= 0),
        _row("quicker to decide than greedy per byte", f"{number(times)} times",
             f"{number(FASTER)} times", times >= FASTER),
        _row("model evaluations to decide", number(policy.evaluations), "none",
             policy.evaluations == 0),
    ]  # fmt: skip


def _within(comparison: Comparison, policy: Summary, other: str) -> list[list[str]]:
    found = compare_pair(comparison, policy.method, other)
    if not found or not found.relative:
        return []
    most = WITHIN[other]
    goal = f"loss in the mean against {look(other).label}"
    target = f"{signed_percent(most, 0)} or less"
    return [_row(goal, relative_words(found.relative), target, found.relative.mean <= most)]


def _relative(found: PairwiseComparison) -> str:
    return relative_words(found.relative) if found.relative else f"{found.difference} nats/token"


def _row(goal: str, reached: str, target: str, met: bool) -> list[str]:
    return [goal, reached, target, "yes" if met else "no"]

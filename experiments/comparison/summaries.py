"""Aggregate result rows: a summary for each method, an estimate for each cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.comparison.result_rows import QUALITY, ResultRow
from experiments.config.common import Cell, Shape
from experiments.study.plotting import look, rank
from experiments.study.statistics import (
    Estimate,
    bootstrap_mean,
    difference_p,
    holm,
    mean_of_known,
    paired_difference,
    relative_difference,
)
from rap_env.errors import ArtifactError

REFERENCE = "dense"


@dataclass(frozen=True)
class Summary:
    """One method over all cells.

    Attributes:
        delta_nll: Mean ΔNLL over cells, seeds and windows, nats per token, with a 95 %
            interval.
        delta_nll_calibration: Mean ΔNLL on the calibration text, nats per token.
        accuracy: Mean accuracy over tasks, cells and seeds, in [0, 1], or None.
        quality: Means over cells and seeds of what all rows have of
            `experiments.comparison.result_rows.QUALITY`, by name.
        evaluations: Mean number of plans scored for one request.
        setup_evaluations: Plans scored once, before any request.
        training_s: Mean seconds of training over seeds; None if not recorded.
        decision_s: Median seconds from request to plan.
        fitting: Number of rows whose peak is within the budget, of `rows` rows.
    """

    method: str
    delta_nll: Estimate
    delta_nll_calibration: float
    accuracy: float | None
    quality: dict[str, float]
    evaluations: float
    setup_evaluations: int
    training_s: float | None
    decision_s: float
    fitting: int
    rows: int

    @property
    def label(self) -> str:
        """First cell of its line in tables, with the number of seeds if there are several."""
        seeds = self.delta_nll.seeds
        return f"{look(self.method).label}{f' ({seeds})' if seeds > 1 else ''}"

    @property
    def fits_all(self) -> bool:
        """Whether the method met every budget."""
        return self.fitting == self.rows


class Comparison:
    """All rows of one evaluation.

    Args:
        rows: Result rows, all measured on the same report text. Duplicates count once.

    Raises:
        ArtifactError: There are no rows, they were measured on different texts or models, or
            two of the same method, seed and cell have different plans.
    """

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        self.rows = _distinct(rows)
        if not self.rows:
            raise ArtifactError(
                "There are no result rows to compare; run `python -m experiments.evaluate` first."
            )
        check_equal(self.rows, ("report_sha256", "model_fingerprint"))

    @cached_property
    def methods(self) -> list[str]:
        """All methods, in the order of legends."""
        return sorted({row.method for row in self.rows}, key=lambda m: (rank(m), m))

    @cached_property
    def compared(self) -> list[str]:
        """All methods but the native model."""
        return [method for method in self.methods if method != REFERENCE]

    @cached_property
    def learned(self) -> list[str]:
        """The trained methods."""
        identities = [(row.method, row.depends_on.get("method", {})) for row in self.rows]
        trained = {method for method, identity in identities if "run" in identity}
        return [method for method in self.methods if look(method).learned or method in trained]

    @cached_property
    def shapes(self) -> list[Shape]:
        """Batch sizes and lengths, in ascending order of tokens."""
        return sorted({row.shape for row in self.rows}, key=lambda s: (s[0] * s[1], s))

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells that every compared method has; means are over these only."""
        have = [
            {row.cell for row in self.rows if row.method == method}
            for method in self.compared or self.methods
        ]
        return sorted(set.intersection(*have), key=lambda c: (c[0] * c[1], c[0], -c[2]))

    @property
    def budgets(self) -> list[float]:
        """Budget fractions, from loose to tight."""
        return sorted({row.budget_fraction for row in self.rows}, reverse=True)

    def budgets_of(self, shape: Shape) -> list[float]:
        """Budget fractions of one request, from loose to tight."""
        return sorted({r.budget_fraction for r in self.rows if r.shape == shape}, reverse=True)

    @cached_property
    def same_budgets(self) -> bool:
        """Whether all requests have the same budget fractions."""
        return all(self.budgets_of(shape) == self.budgets for shape in self.shapes)

    @cached_property
    def targets(self) -> dict[float, list[Cell]]:
        """The cells of each ΔNLL that budgets stand for, in ascending order; empty if none do."""
        by_target: dict[float, list[Cell]] = defaultdict(list)
        targets = {row.cell: row.target_delta_nll for row in self.rows}
        for cell in self.cells:
            if (target := targets[cell]) is not None:
                by_target[target].append(cell)
        return dict(sorted(by_target.items()))

    def at(self, method: str, cell: Cell) -> list[ResultRow]:
        """Return the rows of a method at a cell, one for each seed."""
        return self._by_cell.get((method, cell), [])

    def delta_nll_at(self, method: str, cell: Cell) -> Estimate | None:
        """Return the ΔNLL of a method at a cell; None without rows."""
        losses = self.window_delta_nlls(method, cell)
        return bootstrap_mean(losses) if losses else None

    def window_means(
        self, method: str, cells: Sequence[Cell] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return ΔNLL averaged over cells (default: `cells`), shape (seeds, windows).

        Seeds that lack a cell are left out, so that all averages are over the same cells.
        """
        cells = self.cells if cells is None else cells
        seeds: dict[int | None, list[Sequence[float]]] = defaultdict(list)
        for cell in cells:
            for row in self.at(method, cell):
                seeds[row.seed].append(row.window_delta_nll)
        whole = [losses for losses in seeds.values() if len(losses) == len(cells)]
        return np.asarray(np.mean(np.array(whole, dtype=np.float64), axis=1))

    def window_delta_nlls(self, method: str, cell: Cell) -> list[list[float]]:
        """Return the ΔNLL of a method at a cell, shape (seeds, windows)."""
        return [row.window_delta_nll for row in self.at(method, cell)]

    @cached_property
    def summaries(self) -> list[Summary]:
        """One summary for each compared method: those that meet every budget first, by ΔNLL."""
        if not self.cells:
            return []
        summaries = [self.summary(method) for method in self.compared]
        return sorted(summaries, key=lambda s: (not s.fits_all, s.delta_nll.mean))

    @property
    def lines(self) -> dict[str, str]:
        """The methods by the first cells of their lines in tables."""
        return {summary.label: summary.method for summary in self.summaries}

    @cached_property
    def _by_cell(self) -> dict[tuple[str, Cell], list[ResultRow]]:
        by_cell: dict[tuple[str, Cell], list[ResultRow]] = defaultdict(list)
        for row in self.rows:
            by_cell[row.method, row.cell].append(row)
        return by_cell

    def summary(self, method: str, cells: Sequence[Cell] | None = None) -> Summary:
        """Return the summary of a method over some cells (default: `cells`)."""
        cells = self.cells if cells is None else cells
        rows = [row for cell in cells for row in self.at(method, cell)]
        return Summary(
            method=method,
            delta_nll=bootstrap_mean(self.window_means(method, cells)),
            delta_nll_calibration=float(np.mean([row.calibration_delta_nll for row in rows])),
            accuracy=mean_of_known(row.mean_accuracy for row in rows),
            quality=mean_quality(rows),
            evaluations=float(np.mean([row.evaluations for row in rows])),
            setup_evaluations=max(row.setup_evaluations for row in rows),
            training_s=mean_of_known(row.training_s for row in rows),
            decision_s=float(np.median([row.decision_s for row in rows])),
            fitting=sum(row.fits for row in rows),
            rows=len(rows),
        )


def check_equal(rows: Sequence[ResultRow], keys: Iterable[str]) -> None:
    """Check that all rows depend on the same model, text and so on, by the keys of `depends_on`.

    Raises:
        ArtifactError: They do not.
    """
    for key in keys:
        seen = {str(row.depends_on.get(key)) for row in rows}
        if len(seen) > 1:
            raise ArtifactError(
                f"The result rows differ in {key} ({len(seen)} values), so their ΔNLL cannot "
                "be compared. Report one run folder at a time."
            )


def mean_quality(rows: Iterable[ResultRow]) -> dict[str, float]:
    """Return the means of those of `QUALITY` that all rows have, by name."""
    measured = [row.quality for row in rows]
    names = [name for name in QUALITY if all(name in values for values in measured)]
    return {name: float(np.mean([values[name] for values in measured])) for name in names}


def _distinct(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Remove duplicate rows; the one that was measured last is kept.

    Raises:
        ArtifactError: Two rows of the same method, seed and cell have different plans.
    """
    latest: dict[tuple[object, ...], ResultRow] = {}
    for row in rows:
        place = row.method, row.seed, row.cell
        if latest.setdefault(place, row).plan != row.plan:
            raise ArtifactError(
                f"Two result rows of {row.method} (seed {row.seed}) at {row.cell} have different "
                "plans, so they were made with different settings. Report one run folder at a time."
            )
        latest[place] = row
    return list(latest.values())


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

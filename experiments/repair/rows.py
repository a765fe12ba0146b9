"""Rows of ``experiments.repair``, and their means and ratios to removal without stubs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from experiments.study.looks import rank
from experiments.study.records import Cell, CellRecord
from experiments.study.statistics import RESAMPLES, SEED, Estimate, resample_weights

PLAIN = "none"
"""The repair that is none."""

REPAIRS = (PLAIN, "library")

Strata = list[npt.NDArray[np.float64]]
"""One array of shape (windows,) per report text; the sum of their means is the mean ΔNLL."""


@dataclass(frozen=True)
class RepairRow(CellRecord):
    """One repair, request, budget and report text; masks are repaired with the stubs.

    Attributes:
        repair: One of `REPAIRS`.
        text: Name of the report text.
        fitted_on: Names of the texts that stubs were fitted on; empty without stubs.
        fit_tokens: Number of tokens of those texts.
        mask: Names of the removed blocks.
        accuracies: Accuracy of each lm-eval task in [0, 1] under the mask; the same for all texts,
            empty without tasks.
        dense_accuracies: The same of the dense model.
    """

    file = "repair.jsonl"
    record_name = "A repair record"
    rerun = "make it again"
    identity = ("repair", "cell", "text")

    repair: str
    text: str
    fitted_on: list[str]
    fit_tokens: int
    mask: list[str]
    accuracies: dict[str, float] = field(default_factory=dict)
    dense_accuracies: dict[str, float] = field(default_factory=dict)


class RepairComparison:
    """All rows of the study.

    Attributes:
        rows: A row for each measurement; of several of the same, the last.
    """

    def __init__(self, rows: Iterable[RepairRow]) -> None:
        self._rows = {(row.repair, row.cell, row.text): row for row in rows}
        self.rows = list(self._rows.values())

    @cached_property
    def repairs(self) -> list[str]:
        """Repairs in the order of legends."""
        return sorted({row.repair for row in self.rows}, key=lambda r: (rank(r), r))

    @cached_property
    def texts(self) -> list[str]:
        """Report texts: those of fitted domains first, otherwise in the order of the rows."""
        return sorted(dict.fromkeys(row.text for row in self.rows), key=self.is_other)

    def is_other(self, text: str) -> bool:
        """Whether no stub was fitted on text of this domain."""
        return not any(text in row.fitted_on for row in self.rows)

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells: small requests first, each from large to small budgets."""
        return sorted({row.cell for row in self.rows}, key=lambda c: (c[0] * c[1], c[0], -c[2]))

    def at(self, repair: str, cell: Cell, text: str) -> RepairRow | None:
        """Return a row, or None."""
        return self._rows.get((repair, cell, text))

    def of(self, repair: str) -> list[RepairRow]:
        """Rows of a repair."""
        return [row for row in self.rows if row.repair == repair]

    def on(self, repair: str, *, other: bool) -> list[RepairRow]:
        """Rows of a repair on texts of fitted domains or of other domains."""
        return [row for row in self.of(repair) if self.is_other(row.text) == other]

    def ratio(self, rows: Sequence[RepairRow]) -> Estimate | None:
        """Mean ΔNLL over rows, divided by that without stubs on the same cells and texts.

        Rows whose cell and text were not measured without stubs are left out.

        Returns:
            The ratio with a 95 % interval, windows resampled jointly; None without rows, or if
            the ΔNLL without stubs is not significantly above 0.
        """
        pairs = [(row, plain) for row in rows if (plain := self.at(PLAIN, row.cell, row.text))]
        if not pairs:
            return None
        return _estimate(_strata([row for row, _ in pairs]), _strata([row for _, row in pairs]))


def mean_delta_nll(rows: Sequence[RepairRow]) -> Estimate | None:
    """Mean ΔNLL over rows, the windows of each text resampled; None without rows."""
    return _estimate(_strata(rows)) if rows else None


def _strata(rows: Sequence[RepairRow]) -> Strata:
    """Per text, the sum of its rows' window ΔNLL divided by the number of all rows."""
    texts = dict.fromkeys(row.text for row in rows)
    return [
        np.sum([row.window_losses for row in rows if row.text == text], axis=0) / len(rows)
        for text in texts
    ]


def _estimate(top: Strata, bottom: Strata | None = None) -> Estimate | None:
    """Sum of the means of `top`, divided by that of `bottom` if given, with a 95 % interval.

    Windows of each text are resampled jointly; None if a divisor is not above 0.
    """
    rng = np.random.default_rng(SEED)
    above, below = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for place, values in enumerate(top):
        weights = resample_weights(rng, len(values), RESAMPLES)
        above += weights @ values
        below += weights @ bottom[place] if bottom else 0.0
    mean = sum(float(values.mean()) for values in top)
    if bottom:
        divisor = sum(float(values.mean()) for values in bottom)
        if min(divisor, below.min()) <= 0:
            return None
        mean, above = mean / divisor, above / below
    low, high = np.quantile(above, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))

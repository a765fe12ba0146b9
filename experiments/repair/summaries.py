"""Summaries of repair rows: means over the grid and ratios to removal without stubs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from experiments.repair.records import RepairRow
from experiments.study.looks import rank
from experiments.study.records import Cell
from experiments.study.statistics import RESAMPLES, SEED, Estimate, resample_weights
from rap_env.errors import ArtifactError

Pair = tuple[Cell, str]
"""A cell and the report text on which it was measured."""

Strata = list[npt.NDArray[np.float64]]
"""One array of shape (windows,) per report text; the sum of their means is the mean ΔNLL."""

PLAIN = "none"


@dataclass(frozen=True)
class RepairSummary:
    """One repair over the whole grid.

    Attributes:
        fitted: Mean ΔNLL over cells and texts of fitted domains, nats per token; None without.
        fitted_ratio: `fitted` as a share of the ΔNLL without stubs.
        other: Mean ΔNLL over cells and texts of other domains; None without.
        other_ratio: `other` as a share of the ΔNLL without stubs.
        accuracy: Mean accuracy over tasks and cells, in [0, 1], or None.
        fit_tokens: Maximum of the tokens that its stubs were fitted on.
        fitting: Number of cells whose mask is within the budget.
    """

    repair: str
    fitted: Estimate | None
    fitted_ratio: Estimate | None
    other: Estimate | None
    other_ratio: Estimate | None
    accuracy: float | None
    fit_tokens: int
    fitting: int
    cells: int


class RepairComparison:
    """All rows of one ``repair.jsonl``.

    Args:
        rows: Its rows; of rows with the same measurement, the last counts.
        dense_accuracies: Accuracy of each lm-eval task of the dense model, if known.

    Raises:
        ArtifactError: There are no rows, or they are of different models or texts.
    """

    def __init__(
        self, rows: Iterable[RepairRow], dense_accuracies: Mapping[str, float] | None = None
    ) -> None:
        self.dense_accuracies = dict(dense_accuracies or {})
        last = {_same(row): row for row in rows}
        self.rows = list(last.values())
        if not self.rows:
            raise ArtifactError(
                "There are no repair rows to compare; run `python -m experiments.repair` first."
            )
        self._check_same_text()

    def study(self, name: str) -> list[RepairRow]:
        """Rows of one study."""
        return [row for row in self.rows if row.study == name]

    @cached_property
    def repairs(self) -> list[str]:
        """Repairs of the grid, in the order of legends."""
        return sorted({row.repair for row in self.study("grid")}, key=lambda r: (rank(r), r))

    @cached_property
    def fitted_texts(self) -> set[str]:
        """Names of the texts that the stubs of the grid (or else of any study) were fitted on."""
        rows = [row for row in self.study("grid") if row.fitted_on] or self.rows
        return {name for row in rows for name in row.fitted_on}

    @cached_property
    def texts(self) -> list[str]:
        """Report texts: those of fitted domains first, otherwise in the order of the rows."""
        return sorted(dict.fromkeys(row.text for row in self.rows), key=self.is_other)

    def is_other(self, text: str) -> bool:
        """Whether no stub of the grid was fitted on text of this domain."""
        return text not in self.fitted_texts

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells of the grid: small requests first, each from large to small budgets."""
        found = {row.cell for row in self.study("grid")}
        return sorted(found, key=lambda c: (c[0] * c[1], c[0], -c[2]))

    @cached_property
    def pairs(self) -> set[Pair]:
        """Pairs of cell and text that every repair has; means are over these pairs only."""
        have = [{_pair(row) for row in self._of(repair)} for repair in self.repairs]
        return set.intersection(*have) if have else set()

    @property
    def incomplete(self) -> bool:
        """Whether a repair lacks pairs that another repair has."""
        return len(self.pairs) < len({_pair(row) for row in self.study("grid")})

    def at(self, repair: str, cell: Cell, text: str) -> RepairRow | None:
        """Return the row of the grid, or None."""
        return self._grid.get((repair, (cell, text)))

    def delta_nll(self, rows: Sequence[RepairRow]) -> Estimate | None:
        """Mean ΔNLL over rows, the windows of each text resampled; None without rows."""
        return _estimate(_strata(rows)) if rows else None

    def ratio(self, rows: Sequence[RepairRow]) -> Estimate | None:
        """Mean ΔNLL over rows, divided by that without stubs on the same cells and texts.

        Rows whose cell and text were not measured without stubs are left out.

        Returns:
            The ratio with a 95 % interval, windows resampled jointly; None without rows, or if
            the ΔNLL without stubs is not significantly above 0.
        """
        paired = [
            (row, plain)
            for row in rows
            if (plain := self._grid.get((PLAIN, _pair(row)))) is not None
        ]
        if not paired:
            return None
        return _estimate(_strata([row for row, _ in paired]), _strata([row for _, row in paired]))

    def ratio_of(self, repair: str, *, other: bool) -> Estimate | None:
        """Ratio of a repair over the grid, on texts of fitted domains or of other domains."""
        return self.ratio(self._grid_rows(repair, lambda text: self.is_other(text) == other))

    @cached_property
    def summaries(self) -> list[RepairSummary]:
        """One summary per repair, in the order of legends."""
        return [self._summary(repair) for repair in self.repairs] if self.pairs else []

    @cached_property
    def token_rows(self) -> dict[int, list[RepairRow]]:
        """Rows of the token study by number of tokens, with the whole library of the grid."""
        rows = self.study("tokens")
        known = {(row.cell, row.text, tuple(row.fitted_on)) for row in rows}
        whole = [row for row in self.study("grid") if row.repair == "library"]
        rows += [row for row in whole if (row.cell, row.text, tuple(row.fitted_on)) in known]
        counts = sorted({row.fit_tokens for row in rows})
        return {count: [row for row in rows if row.fit_tokens == count] for count in counts}

    def _summary(self, repair: str) -> RepairSummary:
        fitted = self._grid_rows(repair, lambda text: not self.is_other(text))
        other = self._grid_rows(repair, self.is_other)
        by_cell = {row.cell: row for row in fitted + other}
        known = [row.accuracies for row in by_cell.values() if row.accuracies]
        means = [float(np.mean(list(accuracies.values()))) for accuracies in known]
        return RepairSummary(
            repair=repair,
            fitted=self.delta_nll(fitted),
            fitted_ratio=self.ratio(fitted),
            other=self.delta_nll(other),
            other_ratio=self.ratio(other),
            accuracy=float(np.mean(means)) if means else None,
            fit_tokens=max(row.fit_tokens for row in by_cell.values()),
            fitting=sum(row.peak_bytes <= row.budget_bytes for row in by_cell.values()),
            cells=len(by_cell),
        )

    def _of(self, repair: str) -> list[RepairRow]:
        return [row for row in self.study("grid") if row.repair == repair]

    def _grid_rows(self, repair: str, wanted: Callable[[str], bool]) -> list[RepairRow]:
        """Return the rows of a repair on the common pairs whose text is wanted."""
        rows = [row for row in self._of(repair) if _pair(row) in self.pairs]
        return [row for row in rows if wanted(row.text)]

    @cached_property
    def _grid(self) -> dict[tuple[str, Pair], RepairRow]:
        return {(row.repair, _pair(row)): row for row in self.study("grid")}

    def _check_same_text(self) -> None:
        first: dict[tuple[str, str], object] = {}
        for row in self.rows:
            depends = row.provenance.get("depends_on", {})
            seen = {
                ("model_fingerprint", ""): depends.get("model_fingerprint"),
                ("calibration_sha256", ""): depends.get("calibration_sha256"),
                ("report_sha256", row.text): depends.get("report_sha256"),
                ("number of windows", row.text): len(row.window_losses),
            }
            for (what, text), value in seen.items():
                if first.setdefault((what, text), value) != value:
                    where = f" of the text {text!r}" if text else ""
                    raise ArtifactError(
                        f"The repair rows differ in {what}{where}, so their ΔNLL cannot be "
                        "compared; report one run folder at a time."
                    )


def _same(row: RepairRow) -> tuple[object, ...]:
    """Identifies the measurement of a row, independently of its tasks."""
    fitted = tuple(row.fitted_on), row.fit_tokens if row.study != "grid" else 0
    return row.study, row.repair, row.cell, row.text, *fitted


def _pair(row: RepairRow) -> Pair:
    return row.cell, row.text


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

"""How well predicted losses agree with measured ones. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

SMALL_DELTA_NLL = 0.01
"""Nats per token: the least denominator of a relative error."""

_FEW, _SOME = 0.1, 0.25  # shares of the blocks


@dataclass(frozen=True)
class FidelityRow:
    """Agreement on the plans of one group.

    Attributes:
        removed: Name of the group, by its number of removed blocks.
        masks: Number of plans.
        spearman: Rank correlation in [-1, 1]; None if it is not defined.
        mean_error: Mean absolute error of delta_nll, nats per token; None without plans.
        median_relative_error: Median of error / delta_nll, the latter at least
            `SMALL_DELTA_NLL`; None without plans.
    """

    removed: str
    masks: int
    spearman: float | None
    mean_error: float | None
    median_relative_error: float | None

    @classmethod
    def of(cls, removed: str, predicted: Floats, measured: Floats) -> FidelityRow:
        """Compare predicted with measured delta_nll, nats per token, both (N,)."""
        if not len(measured):
            return cls(removed, 0, None, None, None)
        errors = np.abs(predicted - measured)
        relative = errors / np.maximum(np.abs(measured), SMALL_DELTA_NLL)
        return cls(
            removed=removed,
            masks=len(measured),
            spearman=spearman(predicted, measured),
            mean_error=float(errors.mean()),
            median_relative_error=float(np.median(relative)),
        )


@dataclass(frozen=True)
class Fidelity:
    """Agreement on plans that a predictor was not fitted to.

    The held-out plans come from the same distribution as the fitted ones, so the predictor
    has seen neighbours of them. Agreement on plans from another distribution is worse.

    Attributes:
        fitted: Number of plans that the evaluated predictor was fitted to.
        rows: All held-out plans, then those with few, some and many removals.
    """

    fitted: int
    rows: tuple[FidelityRow, ...]

    @classmethod
    def of(
        cls, predicted: Floats, measured: Floats, removed: Counts, num_blocks: int, fitted: int
    ) -> Fidelity:
        """Compare delta_nll in nats per token, by the number of removed blocks, all (N,)."""
        few, some = round(_FEW * num_blocks), round(_SOME * num_blocks)
        groups: list[tuple[str, npt.NDArray[np.bool_]]] = [
            ("all", np.ones(len(removed), dtype=bool)),
            (f"few (to {few})", removed <= few),
            (f"some (to {some})", (few < removed) & (removed <= some)),
            (f"many (over {some})", some < removed),
        ]
        rows = (FidelityRow.of(name, predicted[part], measured[part]) for name, part in groups)
        return cls(fitted, tuple(rows))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Fidelity:
        """Read what `dataclasses.asdict` and JSON wrote."""
        return cls(values["fitted"], tuple(FidelityRow(**row) for row in values["rows"]))


def spearman(first: Floats, second: Floats) -> float | None:
    """Rank correlation with mean ranks for ties; None if one side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], dtype=np.float64)

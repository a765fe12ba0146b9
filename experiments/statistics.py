"""Means with intervals. Small on purpose: all of the report's uncertainty is made here.

A loss is measured on the same held-out windows for every method, so windows are resampled
jointly (paired): a window that is hard for all does not widen the interval of a difference.
Where a method has several seeds, seeds are resampled too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Bootstrap resamples; the end points of a 95 % interval then move by about 1 % of its width."""

SEED = 20_250_517
"""Seeds every resampling, so that the same records give the same intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, in the unit of the values.

    Attributes:
        mean: The mean over all values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: How many seeds stand behind it.
    """

    mean: float
    low: float
    high: float
    seeds: int = 1

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """Mean and percentile-bootstrap interval over windows, and over seeds if there are several.

    Args:
        values: Shape (windows,) or (seeds, windows). Both axes are resampled with
            replacement, each resample drawing one set of seeds and one set of windows.
        level: Probability that the interval should cover.
        resamples: Number of resamples.

    Returns:
        The estimate. With one window and one seed the interval is the mean itself: there is
        nothing to resample, and a report should say so.

    Raises:
        ValueError: There are no values, or some are not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"A mean needs finite values, at least one; got {table!r}.")
    seeds, windows = table.shape
    rng = np.random.default_rng(SEED)
    window_weights = resample_weights(rng, windows, resamples)
    if seeds == 1:
        means = window_weights @ table[0]
    else:
        seed_weights = resample_weights(rng, seeds, resamples)
        means = np.einsum("rs,sw,rw->r", seed_weights, table, window_weights, optimize=True)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(float(table.mean()), float(low), float(high), seeds)


def paired_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95
) -> Estimate:
    """`first` minus `second`, window by window, with an interval.

    Args:
        first: Losses of one method, shape (windows,) or (seeds, windows).
        second: Losses of another on the same windows; its seeds are averaged first.
        level: Probability that the interval should cover.

    Raises:
        ValueError: The two were not measured on the same number of windows.
    """
    one = np.atleast_2d(np.asarray(first, dtype=np.float64))
    two = np.atleast_2d(np.asarray(second, dtype=np.float64))
    if one.shape[1] != two.shape[1]:
        raise ValueError(
            f"Paired losses need the same windows: {one.shape[1]} against {two.shape[1]}."
        )
    return bootstrap_mean(one - two.mean(axis=0), level=level)


def wilson_interval(accuracy: float, documents: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of an accuracy over `documents` independent questions.

    Args:
        accuracy: Share of right answers, in [0, 1].
        documents: Number of questions, at least 1.
        level: 0.95 or 0.9.
    """
    z = {0.95: 1.959964, 0.9: 1.644854}[level]
    shrink = 1.0 + z * z / documents
    centre = (accuracy + z * z / (2 * documents)) / shrink
    spread = accuracy * (1 - accuracy) / documents + z * z / (4 * documents**2)
    half = z * float(np.sqrt(spread)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def resample_weights(
    rng: np.random.Generator, count: int, resamples: int
) -> npt.NDArray[np.float64]:
    """Share of each of `count` items in each resample, shape (resamples, count)."""
    counts = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return np.asarray(counts, dtype=np.float64) / count

"""Means, differences and their bootstrap intervals; the only source of intervals in reports.

Every method is measured on the same held-out windows, so windows are resampled jointly
(paired): a window that is hard for all methods does not widen the interval of a difference.
Seeds are resampled as well if a method has several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Number of bootstrap resamples; ends of a 95 % interval then vary by about 1 % of its
width."""

LEVEL = 0.95
"""Coverage probability of intervals."""

SEED = 20_250_517
"""Seed of every resampling, so that the same records give the same intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, in the unit of the values.

    Attributes:
        mean: The mean over all values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int = 1

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def bootstrap_mean(values: npt.ArrayLike) -> Estimate:
    """Return the mean with a percentile-bootstrap interval over windows, and over several seeds.

    Args:
        values: Shape (windows,) or (seeds, windows). Both axes are resampled with
            replacement, each resample drawing one set of seeds and one set of windows.

    Returns:
        The estimate. With one window and one seed there is nothing to resample, and the
        interval is the mean itself.

    Raises:
        ValueError: There are no values, or some are not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"A mean needs finite values, at least one; got {table!r}.")
    (means,) = _resampled(table)
    return _estimate(table.mean(), means, len(table))


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> Estimate:
    """`first` minus `second`, window by window, with an interval.

    Args:
        first: Losses of one method, shape (windows,) or (seeds, windows).
        second: Losses of another on the same windows; it may have other seeds, which are
            resampled on their own.

    Raises:
        ValueError: The two were not measured on the same number of windows.
    """
    ours, theirs = _paired(first, second)
    means, others = _resampled(ours, theirs)
    return _estimate(ours.mean() - theirs.mean(), means - others, len(ours))


def relative_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> Estimate | None:
    """Return mean `first` divided by mean `second`, minus 1, resampled like `paired_difference`.

    Returns:
        The estimate, such as -0.1 for 10 % less; None if `second` is not significantly above
        0, because the ratio is then meaningless.
    """
    ours, theirs = _paired(first, second)
    means, others = _resampled(ours, theirs)
    if min(float(theirs.mean()), float(others.min())) <= 0:
        return None
    return _estimate(ours.mean() / theirs.mean() - 1.0, means / others - 1.0, len(ours))


def paired_ratio(
    firsts: Sequence[npt.ArrayLike], seconds: Sequence[npt.ArrayLike]
) -> Estimate | None:
    """Return the geometric mean over cells of mean `firsts` divided by mean `seconds`.

    Every cell has the same weight, whatever its losses. Windows are resampled jointly for all
    cells, because the same text is measured at each.

    Args:
        firsts: Losses of one method at each cell, each of shape (windows,) or (seeds,
            windows).
        seconds: Losses of another one at the same cells.

    Returns:
        The estimate; None if there are no cells, or some mean is not significantly above 0,
        because its ratio is then meaningless.
    """
    means, resampled = [], []
    for first, second in zip(firsts, seconds, strict=True):
        ours, theirs = _paired(first, second)
        resampled_ours, resampled_theirs = _resampled(ours, theirs)
        if min(ours.mean(), theirs.mean(), resampled_ours.min(), resampled_theirs.min()) <= 0:
            return None
        means.append(np.log(ours.mean() / theirs.mean()))
        resampled.append(np.log(resampled_ours / resampled_theirs))
    if not means:
        return None
    seeds = min(len(np.atleast_2d(np.asarray(first))) for first in firsts)
    return _estimate(np.exp(np.mean(means)), np.exp(np.mean(resampled, axis=0)), seeds)


def kept_above_chance(
    plan: Mapping[str, npt.NDArray[np.float64]],
    native: Mapping[str, npt.NDArray[np.float64]],
    chance: Mapping[str, float],
) -> Estimate:
    """Return the share of the native accuracy above chance that a plan keeps, mean over tasks.

    For each task (accuracy - chance) / (native accuracy - chance); documents are resampled
    jointly for both, task by task.

    Args:
        plan: 1 for each document that is answered right under the plan, else 0, (documents,),
            by task.
        native: The same of the native model for the tasks to average, in which it must be
            above chance.
        chance: Accuracy of guessing, by task.
    """
    rng, ratios, resampled = np.random.default_rng(SEED), [], []
    for task, native_right in native.items():
        weights, guess = resample_weights(rng, len(native_right)), chance[task]
        ratios.append((plan[task].mean() - guess) / (native_right.mean() - guess))
        resampled.append((weights @ plan[task] - guess) / (weights @ native_right - guess))
    return _estimate(np.mean(ratios), np.mean(resampled, axis=0), 1)


def difference_p(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the two-sided bootstrap p-value of equal means; at least 2 / (`RESAMPLES` + 1).

    Raises:
        ValueError: The two were not measured on the same number of windows.
    """
    means, others = _resampled(*_paired(first, second))
    below, above = int(np.sum(means <= others)), int(np.sum(means >= others))
    return float(min(1.0, 2.0 * (1 + min(below, above)) / (RESAMPLES + 1)))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Return which of several null hypotheses are rejected at a joint level of 5 %.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    rejected = [False] * len(p_values)
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > (1.0 - LEVEL) / (len(p_values) - place):
            break
        rejected[number] = True
    return rejected


def resample_weights(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Return the share of each of `count` items in each resample, shape (`RESAMPLES`, count)."""
    counts = rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    return np.asarray(counts, dtype=np.float64) / count


def _paired(
    first: npt.ArrayLike, second: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    ours = np.atleast_2d(np.asarray(first, dtype=np.float64))
    theirs = np.atleast_2d(np.asarray(second, dtype=np.float64))
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(
            f"Paired values need the same windows: {ours.shape[1]} against {theirs.shape[1]}."
        )
    return ours, theirs


def _resampled(*tables: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Return resampled means of tables (seeds, windows): windows jointly, seeds separately."""
    seeds = tuple(len(table) for table in tables)
    windows, *by_table = _weights(tables[0].shape[1], seeds)
    return [
        np.sum((windows @ table.T) * weights, axis=1)
        for table, weights in zip(tables, by_table, strict=True)
    ]


@lru_cache(16)  # equal for all pairs of methods with the same numbers of windows and seeds
def _weights(windows: int, seeds: tuple[int, ...]) -> tuple[npt.NDArray[np.float64], ...]:
    """Return weights of windows (`RESAMPLES`, windows), then of each table's seeds."""
    rng = np.random.default_rng(SEED)
    weights = [resample_weights(rng, windows)]
    for count in seeds:  # a single seed is not resampled
        weights.append(resample_weights(rng, count) if count > 1 else np.ones((1, 1)))
    return tuple(weights)


def _estimate(mean: float, resampled: npt.NDArray[np.float64], seeds: int) -> Estimate:
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Estimate(float(mean), float(low), float(high), seeds)

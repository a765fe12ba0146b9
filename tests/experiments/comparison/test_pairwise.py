"""Verdicts on rows whose differences are known."""

import numpy as np
import pytest

from experiments.comparison.summaries import Comparison, Counts, compare_pair
from tests.experiments.synthetic_records import WINDOWS, make_row

CELLS = [((1, 128), budget) for budget in (0.9, 0.8, 0.7)] + [((8, 2048), 0.9)]
HARDNESS = np.linspace(0.5, 1.5, WINDOWS)  # of mean 1: windows are hard for all alike
NOISE = np.tile([-0.2, 0.2], WINDOWS // 2)


def rows_of(method, factors, *, seeds=(None,), noise=0.0, **changes):
    """A row a cell and seed, whose mean loss is the cell's factor."""
    return [
        make_row(method, shape, budget, seed=seed,
                 window_delta_nll=(factor * HARDNESS + noise * NOISE).tolist(), **changes)
        for (shape, budget), factor in zip(CELLS, factors, strict=True)
        for seed in seeds
    ]  # fmt: skip


def comparison(*groups):
    return Comparison([row for rows in groups for row in rows])


def test_a_verdict_counts_pairs_and_tests_the_mean():
    pair = compare_pair(
        comparison(
            rows_of("ppo", [0.8, 0.9, 1.3, 1.0], seeds=(0, 1), noise=0.01),
            rows_of("gsi", [1.0, 1.0, 1.0, 1.0]),
        ),
        "ppo", "gsi",
    )  # fmt: skip
    assert pair.cells == pair.corrected == Counts(2, 1, 1)
    assert pair.difference.mean == pytest.approx(0.0, abs=1e-9)
    assert pair.relative.mean == pytest.approx(0.0, abs=1e-9)
    assert pair.verdict == "even"


def test_a_relative_difference_of_a_tenth():
    both = comparison(rows_of("ppo", [0.9] * 4, seeds=(0,)), rows_of("gsi", [1.0] * 4))
    pair = compare_pair(both, "ppo", "gsi")
    assert (pair.relative.low, pair.relative.high) == pytest.approx((-0.1, -0.1))
    assert (pair.verdict, pair.cells) == ("better", Counts(4, 0, 0))
    assert compare_pair(both, "gsi", "ppo").verdict == "worse"
    assert compare_pair(both, "ppo", "knapsack") is None
    half = compare_pair(both, "ppo", "gsi", both.cells[:2])
    assert half.relative.mean == pytest.approx(-0.1)
    assert compare_pair(both, "ppo", "gsi", []) is None


def test_many_pairs_raise_the_significance_threshold():
    """A difference that is just clear alone is not so among four that are tested together."""
    noisy = rows_of("ppo", [0.885, 1.0, 1.0, 1.0], seeds=(0,), noise=1.0)
    pair = compare_pair(comparison(noisy, rows_of("gsi", [1.0] * 4)), "ppo", "gsi")
    assert pair.cells == Counts(1, 3, 0)
    assert pair.corrected == Counts(0, 4, 0)

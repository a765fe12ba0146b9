"""Intervals cover what they should, and pairing helps."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics import Estimate, bootstrap_mean, paired_difference


def test_the_mean_is_the_mean_and_lies_within_its_interval():
    values = np.random.default_rng(0).normal(1.0, 0.3, 40)
    found = bootstrap_mean(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high
    # The normal approximation for 40 draws: 1.96 standard errors on either side.
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = bootstrap_mean(rng.normal(0.0, 1.0, 30), resamples=400)
        covered += found.low <= 0.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_values_give_the_same_interval():
    values = [0.1, 0.5, 0.2, 0.9]
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_seeds_that_differ_widen_the_interval():
    windows = np.random.default_rng(2).normal(1.0, 0.1, 30)
    alike = bootstrap_mean([windows, windows, windows])
    apart = bootstrap_mean([windows - 0.5, windows, windows + 0.5])
    assert alike.mean == pytest.approx(apart.mean)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert apart.seeds == 3


def test_one_value_is_its_own_interval():
    assert bootstrap_mean([0.25]) == Estimate(0.25, 0.25, 0.25, 1)


def test_pairing_tells_apart_what_single_intervals_cannot():
    rng = np.random.default_rng(3)
    hardness = rng.normal(2.0, 1.0, 24)  # windows differ far more than the methods
    one = hardness + rng.normal(0, 0.01, 24)
    two = hardness + 0.05 + rng.normal(0, 0.01, 24)
    first, second = bootstrap_mean(one), bootstrap_mean(two)
    assert first.high > second.low, "alone they overlap"
    difference = paired_difference(one, two)
    assert difference.high < 0
    assert difference.mean == pytest.approx(-0.05, abs=0.01)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_mean(values)


def test_other_windows_cannot_be_paired():
    with pytest.raises(ValueError, match="same windows: 2 against 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])

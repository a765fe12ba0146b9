"""Coverage of intervals, and the effect of pairing."""

import numpy as np
import pytest

from experiments.study.statistics import (
    RESAMPLES,
    Estimate,
    bootstrap_mean,
    difference_p,
    holm,
    kept_above_chance,
    paired_difference,
    paired_ratio,
    relative_difference,
)


def test_the_mean_lies_within_its_interval():
    values = np.random.default_rng(0).normal(1.0, 0.3, 40)
    estimate = bootstrap_mean(values)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low < estimate.mean < estimate.high
    # The normal approximation for 40 draws: 1.96 standard errors on either side.
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.15)


def test_the_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        estimate = bootstrap_mean(rng.normal(0.0, 1.0, 30))
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_that_differ_widen_the_interval():
    windows = np.random.default_rng(2).normal(1.0, 0.1, 30)
    alike = bootstrap_mean([windows, windows, windows])
    apart = bootstrap_mean([windows - 0.5, windows, windows + 0.5])
    assert alike.mean == pytest.approx(apart.mean)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert apart.seeds == 3


def test_paired_differences_are_significant_where_single_intervals_overlap():
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
def test_values_that_have_no_mean_are_rejected(values):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_mean(values)


def test_other_windows_cannot_be_paired():
    with pytest.raises(ValueError, match="same windows: 2 against 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_relative_difference_is_a_ratio_of_means():
    hardness = np.random.default_rng(5).uniform(0.5, 4.0, 24)
    estimate = relative_difference(0.9 * hardness, hardness)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((-0.1, -0.1, -0.1)), (
        "windows are resampled jointly, so that a tenth less on each is a tenth less for sure"
    )
    noisy = relative_difference(0.9 * hardness + np.linspace(-0.3, 0.3, 24), hardness)
    assert noisy.low < -0.1 < noisy.high


def test_no_ratio_to_a_delta_nll_that_may_be_zero():
    windows = np.linspace(-1.0, 1.1, 12)
    assert relative_difference(windows + 1, windows) is None
    assert relative_difference(windows, np.zeros(12)) is None


def test_the_p_value_is_small_if_the_interval_excludes_zero():
    rng = np.random.default_rng(6)
    base = rng.normal(1.0, 0.5, 24)
    clear, none = base + 0.2 + rng.normal(0, 0.05, 24), base + rng.normal(0, 0.05, 24)
    assert difference_p(base, clear) == pytest.approx(2 / (RESAMPLES + 1)), "the least there is"
    assert difference_p(base, none) > 0.05
    assert difference_p(base, base) == 1.0


def test_holm_rejects_in_order_and_stops_at_the_first_non_significant():
    assert holm([0.04, 0.001, 0.03, 0.012]) == [False, True, False, True]
    assert holm([0.04]) == [True]
    assert holm([0.03, 0.03]) == [False, False]
    assert holm([]) == []


def test_a_paired_ratio_weighs_every_cell_alike():
    windows = np.array([1.0, 1.2, 0.9, 1.1])
    cells = [0.1 * windows, 10 * windows]
    estimate = paired_ratio([0.5 * cells[0], 2.0 * cells[1]], cells)
    assert estimate.mean == pytest.approx(1.0)
    assert (estimate.low, estimate.high) == pytest.approx((1.0, 1.0)), (
        "windows are resampled jointly"
    )
    assert paired_ratio([0.25 * cells[0], cells[1]], cells).mean == pytest.approx(0.5)


def test_a_paired_ratio_has_an_interval_and_is_none_without_losses():
    rng = np.random.default_rng(0)
    windows = 1 + 0.1 * rng.standard_normal((3, 20))
    estimate = paired_ratio([0.8 * windows[0]], [windows[1]])
    assert estimate.low < 0.8 < estimate.high
    assert estimate.high - estimate.low < 0.2
    assert paired_ratio([[windows[0], windows[2]]], [windows[1]]).seeds == 2
    assert paired_ratio([], []) is None
    assert paired_ratio([windows[0], [0.1, -0.2, 0.1]], [windows[1], [1.0, 1.0, 1.0]]) is None


def test_the_share_kept_above_chance_is_a_mean_over_tasks():
    native = {"two": np.repeat([1.0, 0.0], [80, 20]), "open": np.repeat([1.0, 0.0], [40, 60])}
    plan = {"two": np.repeat([1.0, 0.0], [65, 35]), "open": np.repeat([1.0, 0.0], [10, 90])}
    chance = {"two": 0.5, "open": 0.0, "other": 0.25}
    kept = kept_above_chance({**plan, "other": np.ones(3)}, native, chance)
    assert kept.mean == pytest.approx((0.15 / 0.3 + 0.1 / 0.4) / 2)
    assert 0.1 < kept.low < kept.mean < kept.high < 0.7
    assert kept_above_chance(native, native, chance) == Estimate(1.0, 1.0, 1.0)
    guess = {"two": np.tile([1.0, 0.0], 50)}
    assert kept_above_chance(guess, {"two": native["two"]}, chance).mean == 0.0

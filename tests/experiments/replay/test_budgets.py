"""Budgets that move: pure functions of time, from settings and from files."""

import json
import math

import numpy as np
import pytest

from experiments.replay.budgets import BUDGETS, Budget, BudgetError, make_budget
from rap_env.errors import UnknownNameError

STEPS = Budget((0, 10, 20), (100, 60, 80))
TENANTS = {
    "name": "cotenants", "unit": "bytes", "capacity": 1000, "floor": 400, "sizes": [100, 200],
    "arrivals_per_minute": 20, "mean_stay_s": 12, "seed": 3,
}  # fmt: skip


def test_each_step_holds_from_its_time_on():
    assert [STEPS.at(t) for t in (-5, 0, 9.999, 10, 19, 20, 1000)] == [
        100, 100, 100, 60, 60, 80, 80
    ]  # fmt: skip
    assert STEPS.next_change(0, 100) == 10
    assert STEPS.next_change(10, 100) == 20
    assert STEPS.next_change(0, 9) is None
    assert STEPS.next_change(20, 100) is None
    constant = make_budget({"name": "constant", "level": 0.5}, 1000)
    assert constant.least(0, 1e6) == constant.most(0, 1e6) == 500
    assert constant.next_change(0, 1e6) is None


def test_the_minimum_includes_both_ends_and_the_initial_level():
    assert STEPS.least(0, 9.9) == 100
    assert STEPS.least(0, 10) == STEPS.least(15, 30) == 60
    assert STEPS.least(20, 30) == STEPS.least(25, 25) == STEPS.most(15, 30) == 80


def test_steps_start_again_after_their_period():
    budget = Budget((0, 10), (100, 60), period_s=15)
    assert [budget.at(t) for t in (0, 12, 15, 24.9, 25, 30)] == [100, 60, 100, 100, 60, 100]
    assert budget.next_change(12, 100) == 15
    assert budget.least(15, 24) == 100


def test_a_sine_budget_has_its_stated_mean():
    sine = {"name": "sine", "mean": 1.0, "amplitude": 0.3, "period_s": 40}
    budget = make_budget(sine, 1000)
    seen = [budget.at(t) for t in np.arange(0, 80, 0.1)]
    assert np.mean(seen) == pytest.approx(1000, abs=5)
    assert 1290 < max(seen) <= 1300
    assert 700 <= min(seen) < 710
    assert budget.at(10) == pytest.approx(1300, abs=5)
    assert budget.least(0, 40) == min(seen)
    assert make_budget({**sine, "phase_s": 10}, 1000).at(0) == pytest.approx(1300, abs=5)


def test_co_tenants_respect_the_floor_and_their_arrival_rate():
    budget = make_budget(TENANTS, 1)
    levels = np.array([budget.at(t) for t in np.arange(0, 20_000, 2.0)])
    assert levels.min() >= 400
    assert levels.max() == 1000
    assert make_budget(TENANTS, 1) == budget
    assert make_budget({**TENANTS, "seed": 4}, 1) != budget
    few = make_budget({**TENANTS, "capacity": 10_000, "floor": 1, "sizes": [100], "seed": 0}, 1)
    used = 10_000 - np.array([few.at(t) for t in np.arange(0, 20_000, 2.0)])
    assert used.mean() == pytest.approx(100 * 20 / 60 * 12, rel=0.05)  # Little's law


def test_every_budgets_minimum_covers_all_times_in_the_interval():
    for budget in (STEPS, make_budget(TENANTS, 1), make_budget("sine", 1000)):
        for start, end in ((0, 5), (3, 47), (11, 300)):
            seen = [budget.at(t) for t in np.linspace(start, end, 2000)]
            assert budget.least(start, end) <= min(seen)
            assert budget.most(start, end) >= max(seen)


def test_every_kind_of_budget_has_defaults_and_levels_as_shares_or_bytes():
    for name in BUDGETS.keys() - {"file"}:
        assert make_budget(name, 10**9).at(3.0) > 0
    assert make_budget({"name": "constant", "unit": "bytes", "level": 321}, 1000).at(0) == 321
    steps = {"name": "step", "times_s": [0, 5], "levels": [1.0, 0.25], "period_s": None}
    assert make_budget(steps, 1000) == Budget([0, 5], [1000, 250])


def test_recorded_budgets_are_read_from_both_forms(tmp_path):
    points = [(7.5, 100), (9.5, 60), (20.0, 80)]
    (tmp_path / "budget.csv").write_text(
        "time_s,budget_bytes\n" + "".join(f"{t},{b}\n" for t, b in points)
    )
    (tmp_path / "budget.jsonl").write_text(
        "".join(json.dumps({"time_s": t, "budget_bytes": b, "why": "x"}) + "\n" for t, b in points)
    )
    for name in ("budget.csv", "budget.jsonl"):
        budget = make_budget({"name": "file", "path": str(tmp_path / name)}, 1)
        assert budget == Budget([0, 2, 12.5], [100, 60, 80])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "time_s,budget\n0,1\n", "cannot be read"),
        ("a.csv", "time_s,budget_bytes\n0,many\n", "cannot be read"),
        ("a.csv", "time_s,budget_bytes\nnan,5\n", "times that ascend"),
        ("a.csv", "time_s,budget_bytes\n", "as many levels as times"),
        ("a.csv", "time_s,budget_bytes\n0,5\n0,6\n", "times that ascend"),
        ("a.csv", "time_s,budget_bytes\n0,0\n", "at least 1 byte"),
        ("a.jsonl", "{\n", "cannot be read"),
        ("a.jsonl", "[1]\n", "cannot be read"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_rejected(tmp_path, name, text, sentence):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BudgetError, match=sentence):
        make_budget({"name": "file", "path": str(tmp_path / name)}, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "constant", "level": 0}, "at least 1 byte"),
        ({"name": "constant", "level": "half"}, "wrong one"),
        ({"name": "constant", "level": math.nan}, "wrong one"),
        ({"name": "constant", "levle": 1}, "levle"),
        ({"name": "file"}, "lacks a setting.*path"),
        ({"name": "constant", "level": 1, "unit": "GB"}, "fraction or bytes"),
        ({"name": "step", "times_s": [1, 2], "levels": [1, 1]}, "ascend from 0"),
        ({"name": "step", "times_s": [0, 2], "levels": [1]}, "as many levels as times"),
        ({"name": "step", "times_s": [0, 9], "levels": [1, 1], "period_s": 9}, "longer than"),
        ({"name": "sine", "mean": 0.1, "amplitude": 0.2}, "at least 1 byte"),
        ({"name": "sine", "period_s": 0}, "period_s .* above 0"),
        ({**TENANTS, "capacity": 300}, "to its capacity"),
        ({**TENANTS, "sizes": []}, "needs sizes"),
        ({**TENANTS, "mean_stay_s": 0}, "mean_stay_s .* above 0"),
    ],
)
def test_invalid_settings_raise_a_short_error(settings, sentence):
    with pytest.raises(BudgetError, match=sentence):
        make_budget(settings, 1000)


def test_unknown_names_are_rejected():
    with pytest.raises(UnknownNameError, match="Did you mean 'sine'"):
        make_budget("sin", 1000)

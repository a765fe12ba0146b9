"""Budgets that move: pure functions of time, from settings and from files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml

from experiments.launch import CONF_DIR
from experiments.replay.budgets import (
    BUDGETS,
    BudgetError,
    CoTenantBudget,
    StepBudget,
    make_budget,
    read_budget,
    sine_budget,
)
from rap_env.errors import UnknownNameError

STEPS = StepBudget((0, 10, 20), (100, 60, 80))
TENANTS = CoTenantBudget(1000, 400, (100, 200), arrivals_per_minute=20, mean_stay_s=12, seed=3)


def test_a_constant_budget_does_not_change():
    budget = StepBudget((0,), (7,))
    assert {budget.at(t) for t in (-1, 0, 5, 1e6)} == {7}
    assert budget.least(0, 1e6) == budget.most(0, 1e6) == 7
    assert budget.next_change(0, 1e6) is None


def test_each_step_holds_from_its_time_on():
    assert [STEPS.at(t) for t in (-5, 0, 9.999, 10, 19, 20, 1000)] == [
        100, 100, 100, 60, 60, 80, 80
    ]  # fmt: skip
    assert STEPS.next_change(0, 100) == 10
    assert STEPS.next_change(10, 100) == 20
    assert STEPS.next_change(0, 9) is None
    assert STEPS.next_change(20, 100) is None


def test_the_minimum_includes_both_ends_and_the_initial_level():
    assert STEPS.least(0, 9.9) == 100
    assert STEPS.least(0, 10) == 60
    assert STEPS.least(15, 30) == 60
    assert STEPS.least(20, 30) == 80
    assert STEPS.least(25, 25) == 80
    assert STEPS.most(15, 30) == 80


def test_the_integral_is_the_sum_of_pieces():
    assert list(STEPS.pieces(5, 25)) == [(5, 100), (10, 60), (5, 80)]
    assert list(STEPS.pieces(3, 3)) == []


def test_steps_start_again_after_their_period():
    budget = StepBudget((0, 10), (100, 60), period_s=15)
    assert [budget.at(t) for t in (0, 12, 15, 24.9, 25, 30)] == [100, 60, 100, 100, 60, 100]
    assert budget.next_change(12, 100) == 15
    assert budget.least(15, 24) == 100


def test_a_sine_budget_has_its_stated_mean():
    budget = sine_budget(1000, 300, period_s=40)
    seen = [budget.at(t) for t in np.arange(0, 80, 0.1)]
    assert np.mean(seen) == pytest.approx(1000, abs=5)
    assert 1290 < max(seen) <= 1300
    assert 700 <= min(seen) < 710
    assert budget.at(10) == pytest.approx(1300, abs=5)
    assert budget.least(0, 40) == min(seen)
    ahead = sine_budget(1000, 300, period_s=40, phase_s=10)
    assert ahead.at(0) == pytest.approx(1300, abs=5)


def test_co_tenants_do_not_depend_on_the_order_of_queries():
    again = CoTenantBudget(1000, 400, (100, 200), arrivals_per_minute=20, mean_stay_s=12, seed=3)
    times = np.linspace(0, 5000, 997)
    forward = [TENANTS.at(t) for t in times]
    backward = [again.at(t) for t in times[::-1]]
    assert forward == backward[::-1]
    other = CoTenantBudget(1000, 400, (100, 200), arrivals_per_minute=20, mean_stay_s=12, seed=4)
    assert [other.at(t) for t in times] != forward


def test_co_tenants_respect_the_floor_and_their_arrival_rate():
    levels = np.array([TENANTS.at(t) for t in np.arange(0, 20_000, 2.0)])
    assert levels.min() >= 400
    assert levels.max() == 1000
    few = CoTenantBudget(10_000, 1, (100,), arrivals_per_minute=20, mean_stay_s=12, seed=0)
    taken = 10_000 - np.array([few.at(t) for t in np.arange(0, 20_000, 2.0)])
    assert taken.mean() == pytest.approx(100 * 20 / 60 * 12, rel=0.05)  # Little's law


def test_every_budgets_minimum_covers_all_times_in_the_interval():
    for budget in (STEPS, TENANTS, sine_budget(1000, 300, period_s=37)):
        for start, end in ((0, 5), (3, 47), (11, 300)):
            seen = [budget.at(t) for t in np.linspace(start, end, 2000)]
            assert budget.least(start, end) <= min(seen)
            moment, held = start, 0.0
            for seconds, level in budget.pieces(start, end):
                assert budget.at(moment + seconds / 2) == level
                moment, held = moment + seconds, held + seconds * level
            assert moment == pytest.approx(end)
            assert held / (end - start) == pytest.approx(np.mean(seen), rel=0.02)


def test_settings_are_shares_of_a_reference_or_bytes():
    assert make_budget({"name": "constant", "level": 0.5}, 1000).at(0) == 500
    assert make_budget({"name": "constant", "unit": "bytes", "level": 321}, 1000).at(0) == 321
    budget = make_budget({"name": "step", "times_s": [0, 5], "levels": [1.0, 0.25]}, 1000)
    assert budget == StepBudget((0, 5), (1000, 250))


def test_every_file_of_the_group_makes_a_budget(tmp_path):
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONF_DIR.glob("budget/*")}
    assert set(found) == set(BUDGETS)
    (tmp_path / "budget.csv").write_text("time_s,budget_bytes\n0,5\n")
    found["file"]["path"] = str(tmp_path / "budget.csv")
    for name, settings in found.items():
        assert settings["name"] == name
        assert make_budget(settings, 10**9).at(3.0) > 0


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
        assert budget == StepBudget((0, 2, 12.5), (100, 60, 80))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "time_s,budget\n0,1\n", "Line 2 of the budget .*budget_bytes"),
        ("a.csv", "time_s,budget_bytes\n0,many\n", "Line 2"),
        ("a.csv", "time_s,budget_bytes\nnan,5\n", "Line 2"),
        ("a.csv", "time_s,budget_bytes\n", "holds no level"),
        ("a.csv", "time_s,budget_bytes\n0,5\n0,6\n", "times that ascend"),
        ("a.csv", "time_s,budget_bytes\n0,0\n", "at least 1 byte"),
        ("a.jsonl", "{\n", "Line 1"),
        ("a.jsonl", "[1]\n", "Line 1"),
    ],
)
def test_a_bad_file_is_rejected_with_its_line(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(BudgetError, match=sentence):
        read_budget(tmp_path / name)


def test_a_missing_file_is_rejected(tmp_path):
    with pytest.raises(BudgetError, match="cannot be read"):
        read_budget(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "constant", "level": 0}, "at least 1 byte"),
        ({"name": "constant", "level": -1}, "at least 0"),
        ({"name": "constant", "level": "half"}, "must be a number"),
        ({"name": "constant", "level": math.nan}, "must be a number"),
        ({"name": "constant"}, "lacks a setting.*level"),
        ({"name": "constant", "level": 1, "unit": "GB"}, "fraction or bytes"),
        ({"name": "step", "times_s": [1, 2], "levels": [1, 1]}, "ascend from 0"),
        ({"name": "step", "times_s": [0, 2], "levels": [1]}, "as many levels as times"),
        ({"name": "step", "times_s": [0, 9], "levels": [1, 1], "period_s": 9}, "longer than"),
        ({"name": "sine", "mean": 0.1, "amplitude": 0.2, "period_s": 9}, "at least 1 byte"),
        ({"name": "sine", "mean": 1, "amplitude": 0.2, "period_s": 0}, "period_s .* above 0"),
        (
            {"name": "cotenants", "capacity": 0.5, "floor": 0.6, "sizes": [0.1],
             "arrivals_per_minute": 1, "mean_stay_s": 1},
            "at most its capacity",
        ),
        (
            {"name": "cotenants", "capacity": 1, "floor": 0.6, "sizes": [],
             "arrivals_per_minute": 1, "mean_stay_s": 1},
            "at least one tenant size",
        ),
    ],
)  # fmt: skip
def test_invalid_settings_raise_a_short_error(settings, sentence):
    with pytest.raises(BudgetError, match=sentence):
        make_budget(settings, 1000)


def test_unknown_names_are_rejected():
    with pytest.raises(UnknownNameError, match="Did you mean 'sine'"):
        make_budget({"name": "sin"}, 1000)
    with pytest.raises(UnknownNameError, match="setting of the budget 'constant'"):
        make_budget({"name": "constant", "levle": 1}, 1000)

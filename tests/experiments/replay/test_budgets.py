"""Budgets that move: pure functions of time, from settings and from files."""

import numpy as np
import pytest

from experiments.replay.budgets import Budget, BudgetError, make_budget
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


def test_the_minimum_includes_both_ends_and_the_initial_level():
    assert STEPS.least(0, 9.9) == 100
    assert STEPS.least(0, 10) == STEPS.least(15, 30) == 60
    assert STEPS.least(20, 30) == STEPS.least(25, 25) == STEPS.most(15, 30) == 80


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
    for budget in (STEPS, make_budget(TENANTS, 1)):
        for start, end in ((0, 5), (3, 47), (11, 300)):
            seen = [budget.at(t) for t in np.linspace(start, end, 2000)]
            assert budget.least(start, end) <= min(seen)
            assert budget.most(start, end) >= max(seen)


def test_levels_are_shares_of_the_reference_or_bytes():
    assert make_budget("cotenants", 1000).most(0, 1e6) == 1050
    assert make_budget("cotenants", 1000).least(0, 1e6) >= 740


def test_a_recorded_budget_begins_at_its_first_time(tmp_path):
    (tmp_path / "budget.csv").write_text("time_s,budget_bytes\n7.5,100\n9.5,60\n20.0,80\n")
    budget = make_budget({"name": "file", "path": str(tmp_path / "budget.csv")}, 1)
    assert budget == Budget([0, 2, 12.5], [100, 60, 80])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("time_s,budget\n0,1\n", "cannot be read"),
        ("time_s,budget_bytes\n0,many\n", "cannot be read"),
        ("time_s,budget_bytes\nnan,5\n", "times that ascend"),
        ("time_s,budget_bytes\n", "as many levels as times"),
        ("time_s,budget_bytes\n0,5\n0,6\n", "times that ascend"),
        ("time_s,budget_bytes\n0,0\n", "at least 1 byte"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_rejected(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "budget.csv").write_text(text)
    with pytest.raises(BudgetError, match=sentence):
        make_budget({"name": "file", "path": str(tmp_path / "budget.csv")}, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"capacity": "half"}, "wrong one"),
        ({"capacty": 1}, "capacty"),
        ({"name": "file"}, "lacks a setting|wrong one"),
        ({"unit": "GB"}, "fraction or bytes"),
        ({"capacity": 300}, "to its capacity"),
        ({"sizes": []}, "needs sizes"),
        ({"mean_stay_s": 0}, "mean_stay_s .* above 0"),
    ],
)
def test_invalid_settings_raise_a_short_error(changes, sentence):
    with pytest.raises(BudgetError, match=sentence):
        make_budget(TENANTS | changes, 1000)


def test_an_unknown_budget_is_rejected():
    with pytest.raises(UnknownNameError, match="Did you mean 'cotenants'"):
        make_budget("cotenant", 1000)

"""Progress as a property: if a plan fits one waiting request for two seconds, something runs."""

import logging

import pytest

from tests.runtime.schedules import Schedule, knapsack


@pytest.fixture(scope="module")
def policy():
    return knapsack()


@pytest.fixture
def quiet():
    """Logs nothing: pytest keeps the records of failed passes, and these keep their caches."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("first", [0, 30])
def test_something_runs_within_two_seconds_of_a_plan_that_fits(policy, first):
    passes = sum(Schedule(seed, policy).run(turns=50) for seed in range(first, first + 30))
    assert passes > 240


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.timeout(7200)
def test_ten_thousand_schedules_make_progress(policy):
    for seed in range(1000, 11_000):
        Schedule(seed, policy).run()

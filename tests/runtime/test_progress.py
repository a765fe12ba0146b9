"""Progress as a property: if a plan fits one waiting request for two seconds, something runs."""

import logging

import pytest

from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape
from tests.runtime.harness import Harness, greedy, prompt
from tests.runtime.schedules import MOST_STALLED_S, Schedule, knapsack


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


def seconds_until(harness, engine, true) -> float:
    """Time that idle turns of 0.1 s take until something holds."""
    began_s = harness.time_s
    while not true():
        engine.step()
        harness.time_s += 0.1
        assert harness.time_s < began_s + 30
    return harness.time_s - began_s


def test_a_learned_margin_cannot_stop_a_request_that_fits():
    harness = Harness(guard_order=())
    engine = harness.engine()
    harness.budget_bytes = harness.need(Plan(), BatchShape(2, 40))
    harness.controller.monitor.margin.observe("decode", harness.budget_bytes)
    handle = engine.submit(prompt(5), greedy(4))
    assert not engine.step()
    assert seconds_until(harness, engine, lambda: handle.token_ids) <= MOST_STALLED_S


def test_a_shorter_request_runs_where_the_first_one_waits_for_memory():
    harness = Harness(guard_order=())
    engine = harness.engine()
    long = engine.submit(prompt(30), greedy(30))
    short = engine.submit(prompt(3, 1), greedy(3))
    harness.budget_bytes = harness.need(Plan(), BatchShape(1, 20))
    assert seconds_until(harness, engine, lambda: short.done) <= MOST_STALLED_S
    assert not long.token_ids
    assert engine.stats().stalled_s < 1
    harness.time_s += 5
    assert not engine.step()
    harness.time_s += 5
    assert engine.stats().stalled_s == pytest.approx(5)

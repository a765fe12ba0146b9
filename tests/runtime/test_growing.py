"""Growing with a debounce: when blocks are restored, and when they stay removed."""

from __future__ import annotations

import math
import random

import pytest

from rap_env.plan import Plan
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.memory_monitor import Debounce
from tests.runtime.harness import ORDER, SHAPE, FakePolicy, Harness, between, ordered


def test_headroom_must_last_before_blocks_are_restored():
    harness = ordered(hold_s=2.0)
    harness.budget_bytes = between(harness, 3)
    harness.controller.check(SHAPE)
    harness.budget_bytes = 10**9
    for time_s in (0.0, 1.0, 1.9):
        harness.time_s = time_s
        assert harness.controller.check(SHAPE)
        assert len(harness.mask.removed) == 3
    harness.time_s = 2.0
    harness.controller.check(SHAPE)
    assert harness.mask == Plan()
    assert harness.controller.switcher.recent[-1].trigger == "room"


def test_a_dip_restarts_the_wait():
    harness = ordered(hold_s=2.0)
    tight = harness.budget_bytes = between(harness, 3)
    for time_s, budget in ((0.0, tight), (0.1, 10**9), (1.0, tight), (1.1, 10**9), (2.5, 10**9)):
        harness.time_s, harness.budget_bytes = time_s, budget
        harness.controller.check(SHAPE)
    assert len(harness.mask.removed) == 3
    harness.time_s = 3.2
    harness.controller.check(SHAPE)
    assert harness.mask == Plan()


def test_only_blocks_that_fitted_throughout_are_restored():
    harness = ordered(hold_s=2.0, hysteresis_share=0.0)
    budgets = [between(harness, 5), 10**9, between(harness, 2), 10**9]
    for time_s, budget in enumerate(budgets):
        harness.time_s, harness.budget_bytes = float(time_s), budget
        harness.controller.check(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:2])


def test_a_request_that_leaves_gives_headroom():
    harness = ordered(hold_s=1.0)
    harness.budget_bytes = between(harness, 4)
    harness.controller.check(SHAPE)
    for time_s in (0.5, 1.5):
        harness.time_s = time_s
        harness.controller.check(BatchShape(1, 20))
    assert len(harness.mask.removed) < 4
    assert harness.controller.switcher.recent[-1].trigger == "left"


def switches(budget_of, *, share, hold_s, seconds=60) -> int:
    harness = ordered(hysteresis_share=share, hold_s=hold_s)
    threshold = harness.need(Plan.removing(*ORDER[:2]), SHAPE)
    for step in range(seconds * 10):
        harness.time_s = step / 10
        harness.budget_bytes = int(threshold * budget_of(harness.time_s))
        assert harness.controller.check(SHAPE)
    return harness.controller.switcher.switches


def jitter(time_s: float) -> float:
    return 1 + 0.03 * random.Random(time_s).uniform(-1, 1)


def sine(time_s: float) -> float:
    return 1 + 0.03 * math.sin(2 * math.pi * time_s / 1.5)


@pytest.mark.parametrize("budget_of", [jitter, sine])
def test_a_budget_that_moves_around_a_threshold_does_not_make_the_mask_flap(budget_of):
    assert switches(budget_of, share=0.05, hold_s=2.0) <= 2
    assert switches(budget_of, share=0.0, hold_s=0.0) > 30


def test_a_slow_sine_switches_once_down_and_once_up():
    count = switches(
        lambda time_s: 1 + 0.3 * math.sin(2 * math.pi * time_s / 30), share=0.05, hold_s=2.0
    )
    assert 4 <= count <= 2 * 2 * len(ORDER)


def test_a_policy_that_adds_no_block_is_not_asked_repeatedly():
    mask = Plan.removing(0, 2)
    harness = Harness(policy=FakePolicy(mask), guard_order=ORDER, mask=mask, hold_s=1.0)
    for step in range(200):
        harness.time_s = step / 10
        assert harness.controller.check(SHAPE)
    assert harness.mask == mask
    assert len(harness.policy.asked) == 1


def test_a_mask_that_fits_stays_while_others_run():
    policy = FakePolicy(Plan())
    harness = Harness(policy=policy, guard_order=ORDER, mask=Plan.removing(1))
    assert harness.controller.admit(SHAPE, running=BatchShape(1, 5))
    assert (harness.mask, policy.asked) == (Plan.removing(1), [])
    assert harness.controller.admit(SHAPE)
    assert harness.mask == Plan()


def test_a_request_on_an_idle_engine_restores_blocks_that_fit_with_hysteresis():
    harness = ordered(hysteresis_share=0.05)
    harness.budget_bytes = between(harness, 3)
    harness.controller.admit(SHAPE)
    dense = harness.need(Plan(), SHAPE)
    harness.budget_bytes = int(dense * 1.02)
    assert harness.controller.admit(SHAPE)
    assert 0 < len(harness.mask.removed) < 3
    harness.budget_bytes = int(dense * 1.06)
    assert harness.controller.admit(SHAPE)
    assert harness.mask == Plan()


def test_a_falling_budget_restores_no_attention_block_of_a_running_batch():
    before, said = Plan.removing(0), Plan.removing(1, 2, 3, 5)
    for running in (True, False):
        harness = Harness(policy=FakePolicy(said), guard_order=ORDER, mask=before)
        harness.budget_bytes = harness.need(said, SHAPE)
        assert harness.need(before, SHAPE) > harness.budget_bytes
        if running:
            assert harness.controller.check(SHAPE)
            assert 0 in harness.mask.removed
            assert harness.mask != before.without(
                *said.removed
            )  # blocks that need not be removed stay
            assert harness.controller.switcher.recent[-1].guarded
        else:
            assert harness.controller.admit(SHAPE)
            assert harness.mask == said
        assert harness.need(harness.mask, SHAPE) <= harness.budget_bytes


def test_attention_is_restored_only_where_a_refill_fits():
    for share, dense in ((0.9, False), (1.1, True)):
        harness = Harness(
            guard_order=ORDER, mask=Plan.removing(0), hysteresis_share=0.0, hold_s=1.0
        )
        refill = harness.estimator.refill_bytes(Plan(), SHAPE)
        assert refill > 0
        harness.budget_bytes = harness.need(Plan(), SHAPE) + int(share * refill)
        for time_s in (0.0, 1.0):
            harness.time_s = time_s
            harness.controller.check(SHAPE)
        assert (harness.mask == Plan()) == dense
        refill = harness.estimator.refill_bytes(harness.mask, SHAPE)
        assert (
            0 in harness.mask.removed
            or harness.need(harness.mask, SHAPE) + refill <= harness.budget_bytes
        )


def test_headroom_must_last_and_its_minimum_is_reported():
    debounce = Debounce(hold_s=2.0)
    spares = [(0.0, 50), (1.0, 30), (1.9, 80)]
    assert [debounce.update(time_s, spare, 20) for time_s, spare in spares] == [None] * 3
    assert debounce.update(2.0, 90, 20) == 30


def test_a_moment_without_headroom_restarts_the_wait():
    debounce = Debounce(hold_s=2.0)
    for time_s, spare in ((0.0, 50), (1.0, 10), (1.5, 50), (3.0, 50)):
        assert debounce.update(time_s, spare, 20) is None
    assert debounce.update(3.5, 60, 20) == 50


def test_a_report_starts_a_new_wait():
    debounce = Debounce(hold_s=1.0)
    debounce.update(0.0, 50, 20)
    assert debounce.update(1.0, 50, 20) == 50
    assert debounce.update(1.5, 50, 20) is None
    debounce.reset()
    assert debounce.update(2.4, 50, 20) is None

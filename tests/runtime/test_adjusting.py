"""Going up with patience: when blocks come back, and when they stay away."""

from __future__ import annotations

import math
import random

import pytest

from rap_env.blocks import BlockMask
from rap_env.runtime.demand import Demand
from tests.runtime.stand import DEMAND, ORDER, Says, Stand, between, ordered


def test_room_must_last_before_blocks_come_back():
    stand = ordered(hold_s=2.0)
    stand.budget_bytes = between(stand, 3)
    stand.controller.check(DEMAND)
    stand.budget_bytes = 10**9
    for time_s in (0.0, 1.0, 1.9):
        stand.time_s = time_s
        assert stand.controller.check(DEMAND)
        assert len(stand.mask) == 3
    stand.time_s = 2.0
    stand.controller.check(DEMAND)
    assert stand.mask == BlockMask()
    assert stand.controller.recent[-1].why == "room"


def test_a_dip_while_it_waits_begins_the_wait_anew():
    stand = ordered(hold_s=2.0)
    tight = stand.budget_bytes = between(stand, 3)
    for time_s, budget in ((0.0, tight), (0.1, 10**9), (1.0, tight), (1.1, 10**9), (2.5, 10**9)):
        stand.time_s, stand.budget_bytes = time_s, budget
        stand.controller.check(DEMAND)
    assert len(stand.mask) == 3
    stand.time_s = 3.2
    stand.controller.check(DEMAND)
    assert stand.mask == BlockMask()


def test_only_what_would_have_fitted_all_the_time_comes_back():
    stand = ordered(hold_s=2.0, hysteresis_share=0.0)
    budgets = [between(stand, 5), 10**9, between(stand, 2), 10**9]
    for time_s, budget in enumerate(budgets):
        stand.time_s, stand.budget_bytes = float(time_s), budget
        stand.controller.check(DEMAND)
    assert stand.mask == BlockMask.of(*ORDER[:2])


def test_a_request_that_left_makes_room_too():
    stand = ordered(hold_s=1.0)
    stand.budget_bytes = between(stand, 4)
    stand.controller.check(DEMAND)
    for time_s in (0.5, 1.5):
        stand.time_s = time_s
        stand.controller.check(Demand(1, 20))
    assert len(stand.mask) < 4
    assert stand.controller.recent[-1].why == "left"


def switches(budget_of, *, share, hold_s, seconds=60) -> int:
    stand = ordered(hysteresis_share=share, hold_s=hold_s)
    threshold = stand.need(BlockMask.of(*ORDER[:2]), DEMAND)
    for step in range(seconds * 10):
        stand.time_s = step / 10
        stand.budget_bytes = int(threshold * budget_of(stand.time_s))
        assert stand.controller.check(DEMAND)
    return stand.controller.switches


def jitter(time_s: float) -> float:
    return 1 + 0.03 * random.Random(time_s).uniform(-1, 1)


def sine(time_s: float) -> float:
    return 1 + 0.03 * math.sin(2 * math.pi * time_s / 1.5)


@pytest.mark.parametrize("budget_of", [jitter, sine])
def test_a_budget_that_moves_around_a_threshold_does_not_make_it_flap(budget_of):
    assert switches(budget_of, share=0.05, hold_s=2.0) <= 2
    assert switches(budget_of, share=0.0, hold_s=0.0) > 30


def test_a_slow_sine_is_followed_down_and_up_once_each_way():
    count = switches(
        lambda time_s: 1 + 0.3 * math.sin(2 * math.pi * time_s / 30), share=0.05, hold_s=2.0
    )
    assert 4 <= count <= 2 * 2 * len(ORDER)


def test_a_policy_that_wants_no_more_is_not_asked_again_and_again():
    mask = BlockMask.of(0, 2)
    stand = Stand(policy=Says(mask), guard_order=ORDER, mask=mask, hold_s=1.0)
    for step in range(200):
        stand.time_s = step / 10
        assert stand.controller.check(DEMAND)
    assert stand.mask == mask
    assert len(stand.policy.asked) == 1


def test_while_others_run_a_mask_that_fits_stays():
    policy = Says(BlockMask())
    stand = Stand(policy=policy, guard_order=ORDER, mask=BlockMask.of(1))
    assert stand.controller.admit(DEMAND, beside=Demand(1, 5))
    assert (stand.mask, policy.asked) == (BlockMask.of(1), [])
    assert stand.controller.admit(DEMAND)
    assert stand.mask == BlockMask()


def test_a_new_request_gets_blocks_back_at_once_if_they_fit_with_something_to_spare():
    stand = ordered(hysteresis_share=0.05)
    stand.budget_bytes = between(stand, 3)
    stand.controller.admit(DEMAND)
    dense = stand.need(BlockMask(), DEMAND)
    stand.budget_bytes = int(dense * 1.02)
    assert stand.controller.admit(DEMAND)
    assert 0 < len(stand.mask) < 3
    stand.budget_bytes = int(dense * 1.06)
    assert stand.controller.admit(DEMAND)
    assert stand.mask == BlockMask()


def test_a_budget_that_falls_brings_no_attention_back_among_what_runs():
    before, said = BlockMask.of(0), BlockMask.of(1, 2, 3, 5)
    for running in (True, False):
        stand = Stand(policy=Says(said), guard_order=ORDER, mask=before)
        stand.budget_bytes = stand.need(said, DEMAND)
        assert stand.need(before, DEMAND) > stand.budget_bytes
        if running:
            assert stand.controller.check(DEMAND)
            assert 0 in stand.mask
            assert stand.mask != before | said  # what need not go stays
            assert stand.controller.recent[-1].guarded
        else:
            assert stand.controller.admit(DEMAND)
            assert stand.mask == said
        assert stand.need(stand.mask, DEMAND) <= stand.budget_bytes


def test_attention_comes_back_with_room_only_where_a_refill_fits_too():
    for share, dense in ((0.9, False), (1.1, True)):
        stand = Stand(guard_order=ORDER, mask=BlockMask.of(0), hysteresis_share=0.0, hold_s=1.0)
        refill = stand.needs.refill_bytes(BlockMask(), DEMAND)
        assert refill > 0
        stand.budget_bytes = stand.need(BlockMask(), DEMAND) + int(share * refill)
        for time_s in (0.0, 1.0):
            stand.time_s = time_s
            stand.controller.check(DEMAND)
        assert (stand.mask == BlockMask()) == dense
        refill = stand.needs.refill_bytes(stand.mask, DEMAND)
        assert 0 in stand.mask or stand.need(stand.mask, DEMAND) + refill <= stand.budget_bytes

from __future__ import annotations

import json

import pytest

from rap_env.blocks import BlockMask
from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    MemorySourceError,
    UnknownNameError,
)
from rap_env.llm.live_batch import LiveBatch
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.demand import NOTHING, Demand
from rap_env.runtime.policies import DensePolicy, StaticPolicy
from tests.runtime.stand import DEMAND, ORDER, Says, Stand, between, ordered


def test_a_request_that_fits_leaves_the_model_as_it_is():
    stand = ordered()
    assert stand.controller.admit(DEMAND)
    assert (stand.mask, stand.controller.switches, stand.controller.decisions) == (
        BlockMask(),
        0,
        0,
    )


@pytest.mark.parametrize("count", [1, 3, 6])
def test_at_arrival_as_many_blocks_go_as_the_budget_asks_for(count):
    stand = ordered()
    stand.budget_bytes = between(stand, count)
    assert stand.controller.admit(DEMAND)
    assert stand.mask == BlockMask.of(*ORDER[:count])
    assert stand.controller.recent[-1].why == "arrival"


def test_a_request_that_no_mask_fits_changes_nothing_and_the_policy_is_not_asked():
    stand = ordered()
    stand.budget_bytes = stand.need(stand.everything, DEMAND) - 1
    assert not stand.controller.admit(DEMAND)
    assert (stand.mask, stand.controller.decisions) == (BlockMask(), 0)


def test_could_fit_looks_at_the_largest_budget_and_at_the_sources_limit():
    stand = ordered()
    least = stand.need(stand.everything, DEMAND)
    stand.controller.gauge.most_bytes = 0
    stand.budget_bytes = least - 1
    assert not stand.controller.could_fit(DEMAND)
    stand.budget_bytes = least
    assert stand.controller.could_fit(DEMAND)
    stand.budget_bytes = 0
    assert stand.controller.could_fit(DEMAND)  # there was such a budget once
    stand.controller.gauge.most_bytes = 0
    stand.controller.gauge.memory.limit_bytes = least
    assert stand.controller.could_fit(DEMAND)


def test_a_budget_that_falls_is_followed_before_the_next_step():
    stand = ordered()
    assert stand.controller.check(DEMAND)
    stand.budget_bytes = between(stand, 2)
    assert stand.controller.check(DEMAND)
    assert stand.mask == BlockMask.of(*ORDER[:2])
    assert stand.controller.recent[-1].why == "budget_fell"
    assert stand.meter.used_bytes() <= stand.budget_bytes


def test_a_budget_that_nothing_fits_is_said_so_that_less_is_run():
    stand = ordered()
    stand.budget_bytes = stand.need(stand.everything, DEMAND) - 1
    assert not stand.controller.check(DEMAND)
    assert stand.mask == BlockMask()
    assert stand.controller.check(Demand(1, 10))


def test_with_nothing_to_run_all_goes_that_the_guard_may_take():
    stand = ordered()
    stand.budget_bytes = 10
    assert not stand.controller.check(NOTHING)
    assert stand.mask == stand.everything


def test_the_guard_makes_a_mask_fit_that_does_not():
    stand = Stand(policy=Says(BlockMask.of(4)), guard_order=ORDER)
    expected = BlockMask.of(4, 5, 0)
    stand.budget_bytes = stand.need(expected, DEMAND)
    assert stand.controller.admit(DEMAND)
    assert stand.mask == expected
    assert stand.controller.recent[-1].guarded


def test_the_policys_own_mask_is_taken_if_it_fits():
    mask = BlockMask.of(1, 2, 3)
    stand = Stand(policy=Says(mask), guard_order=ORDER)
    stand.budget_bytes = stand.need(mask, DEMAND) + 10
    assert stand.controller.admit(DEMAND)
    assert stand.mask == mask
    assert not stand.controller.recent[-1].guarded
    assert stand.policy.asked[-1].budget_bytes == stand.budget_bytes


@pytest.mark.parametrize("said", [RuntimeError("no"), BlockMask.of(99), None])
def test_a_policy_that_fails_is_replaced_by_the_guard(said, caplog):
    stand = Stand(policy=Says(said), guard_order=ORDER)
    stand.budget_bytes = between(stand, 3)
    assert stand.controller.admit(DEMAND)
    assert stand.mask == BlockMask.of(*ORDER[:3])
    assert "'says' failed" in caplog.text


def test_the_guards_order_is_the_policys_or_else_by_bytes():
    policy = Says(BlockMask())
    policy.order = ORDER
    stand = Stand(policy=policy)
    assert stand.controller.chooser.order(DEMAND) == ORDER
    freed = stand.needs.freed_bytes(DEMAND)
    by_bytes = Stand(policy=Says(BlockMask())).controller.chooser.order(DEMAND)
    assert sorted(by_bytes) == list(range(6))
    assert [freed[index] for index in by_bytes] == sorted(freed, reverse=True)
    with pytest.raises(UnknownNameError, match=r"layer03\.attn"):
        Stand(guard_order=(6,))


def test_an_empty_order_means_the_policys_mask_or_nothing():
    mask = BlockMask.of(0, 1)
    stand = Stand(policy=StaticPolicy(mask), guard_order=(), mask=mask)
    stand.budget_bytes = need = stand.need(mask, DEMAND)
    assert stand.controller.admit(DEMAND)
    stand.budget_bytes = need - 1
    assert not stand.controller.check(DEMAND)
    assert not stand.controller.admit(DEMAND)
    assert stand.mask == mask


@pytest.mark.parametrize("wrong", [{"hysteresis_share": 1.0}, {"hold_s": -1}, {"margin_share": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidRequestError, match="must be from 0"):
        Stand(**wrong)


def test_bytes_that_nobody_foresaw_are_learned_and_kept_free():
    stand = ordered()
    stand.budget_bytes = between(stand, 2)
    stand.controller.admit(DEMAND)
    stand.meter.noise_bytes = 3 * 10**5
    stand.controller.observe(DEMAND, "prefill")
    learned = stand.controller.margin.bytes
    assert learned == pytest.approx(3 * 10**5 - stand.needs.workspace_bytes(DEMAND), abs=10)
    stand.budget_bytes += learned
    assert stand.controller.check(DEMAND)
    assert len(stand.mask) == 2


def test_measured_bytes_over_the_budget_cost_blocks_though_the_prediction_fits():
    stand = ordered()
    stand.budget_bytes = stand.need(BlockMask(), DEMAND)
    assert stand.controller.check(DEMAND)
    stand.meter.noise_bytes = stand.budget_bytes - stand.llm.held_bytes.total + 1000
    assert stand.controller.check(DEMAND)
    assert stand.mask
    assert stand.meter.used_bytes() <= stand.budget_bytes


def test_bytes_that_appear_while_it_switches_cost_more_blocks_at_once():
    stand = ordered()
    stand.budget_bytes = between(stand, 1)
    apply = stand.llm.apply

    def noisy_apply(mask):
        apply(mask)
        stand.meter.noise_bytes = stand.budget_bytes - stand.needs.bytes(mask, NOTHING) + 2000

    stand.llm.apply = noisy_apply
    fits = stand.controller.check(DEMAND)
    assert stand.controller.switches > 1
    assert not fits or stand.meter.used_bytes() <= stand.budget_bytes


def test_a_pass_that_could_grow_beyond_the_budget_costs_blocks_before_it_runs():
    stand = ordered()
    stand.budget_bytes = stand.need(BlockMask(), DEMAND)
    stand.controller.expect(80, 160)
    assert stand.controller.check(DEMAND)
    assert stand.mask
    coming = stand.needs.coming(stand.mask, DEMAND, 80, 160)
    assert stand.meter.used_bytes() + coming.total <= stand.budget_bytes


def test_at_rest_a_burst_is_forgotten_and_freed_memory_given_back():
    stand = ordered()
    stand.meter.noise_bytes = 10**6
    stand.controller.observe(DEMAND, "decode")
    assert stand.controller.margin.bytes > 0
    stand.meter.noise_bytes = 0
    for _ in range(1100):
        stand.controller.check(NOTHING)
    assert stand.controller.margin.bytes == 0


def test_a_source_that_fails_leaves_the_budget_as_it_was(caplog):
    stand = ordered()
    stand.controller.check(DEMAND)

    def fails(used_bytes):
        raise MemorySourceError("gone")

    stand.controller.gauge.memory.budget_bytes = fails
    assert stand.controller.check(DEMAND)
    assert stand.controller.budget_bytes == stand.budget_bytes
    assert "stays at" in caplog.text


def test_decisions_are_logged_with_bytes_and_seconds(tmp_path):
    path = tmp_path / "decisions.jsonl"
    stand = ordered(log=DecisionLog(path))
    dense = stand.llm.held_bytes.total
    stand.budget_bytes = between(stand, 2)
    stand.time_s = 7.0
    stand.controller.check(DEMAND)
    record = json.loads(path.read_text())
    assert record["time_s"] == 7.0
    assert (record["from"], record["to"]) == ([], list(BlockMask.of(*ORDER[:2]).names))
    assert record["bytes_before"] == dense
    assert record["bytes_after"] == stand.llm.held_bytes.total < dense
    assert record["budget_bytes"] == stand.budget_bytes
    assert record["demand"] == {"batch_size": 4, "seq_len_tokens": 40}
    assert record["switch_s"] > 0


def test_seconds_and_counts_add_up():
    stand = ordered()
    stand.budget_bytes = between(stand, 2)
    stand.controller.check(DEMAND)
    controller = stand.controller
    assert (controller.decisions, controller.switches) == (1, 1)
    assert 0 < controller.decision_s + controller.switch_s <= controller.overhead_s


def test_generate_is_held_within_its_budget_too():
    stand = ordered()
    demand = Demand(2, 30)
    stand.controller.admit(demand)
    before, seen = stand.controller.before_step(demand), []
    budgets = iter([10**9] * 5 + [between(stand, 3, demand)] * 100)

    def step():
        stand.budget_bytes = next(budgets)
        before()
        seen.append((stand.llm.held_bytes.total, stand.budget_bytes))

    import torch

    ids = torch.full((2, 10), 7)
    stand.llm.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, before_step=step)
    assert len(stand.mask) == 3
    assert all(held <= budget for held, budget in seen)
    stand.budget_bytes = 10
    with pytest.raises(InfeasibleBudgetError, match="raise the budget or generate less"):
        before()


def test_keys_and_values_in_use_count_as_used():
    stand = ordered(policy=DensePolicy())
    batch = LiveBatch(stand.llm)
    batch.prefill([[5] * 40] * 4)
    stand.controller.check(DEMAND)
    assert stand.controller.used_bytes == stand.llm.held_bytes.total
    assert stand.controller.used_bytes > stand.llm.held_bytes.weights

from __future__ import annotations

import json

import pytest

from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    MemorySourceError,
    UnknownNameError,
)
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.decisions import DecisionLog
from tests.runtime.harness import ORDER, SHAPE, FakePolicy, Harness, between, ordered


def test_a_request_that_fits_leaves_the_model_as_it_is():
    harness = ordered()
    assert harness.controller.admit(SHAPE)
    controller = harness.controller
    assert harness.mask == Plan()
    assert (controller.switcher.switches, controller.chooser.decisions) == (0, 0)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_at_arrival_as_many_blocks_are_removed_as_needed(count):
    harness = ordered()
    harness.budget_bytes = between(harness, count)
    assert harness.controller.admit(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:count])
    assert harness.controller.switcher.recent[-1].trigger == "arrival"


def test_a_request_that_no_mask_fits_changes_nothing_and_the_policy_is_not_asked():
    harness = ordered()
    harness.budget_bytes = harness.need(harness.everything, SHAPE) - 1
    assert not harness.controller.admit(SHAPE)
    assert (harness.mask, harness.controller.chooser.decisions) == (Plan(), 0)


def test_could_fit_uses_the_largest_budget_and_the_limit_of_the_source():
    harness = ordered()
    least = harness.need(harness.everything, SHAPE)
    harness.controller.monitor.max_budget_bytes = 0
    harness.budget_bytes = least - 1
    assert not harness.controller.could_fit(SHAPE)
    harness.budget_bytes = least
    assert harness.controller.could_fit(SHAPE)
    harness.budget_bytes = 0
    assert harness.controller.could_fit(SHAPE)  # the largest budget so far counts
    harness.controller.monitor.max_budget_bytes = 0
    harness.controller.monitor.source._limit_bytes = least
    assert harness.controller.could_fit(SHAPE)


def test_a_falling_budget_shrinks_the_mask_before_the_next_step():
    harness = ordered()
    assert harness.controller.check(SHAPE)
    harness.budget_bytes = between(harness, 2)
    assert harness.controller.check(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:2])
    assert harness.controller.switcher.recent[-1].trigger == "budget_fell"
    assert harness.meter.used_bytes() <= harness.budget_bytes


def test_check_is_false_where_no_mask_fits():
    harness = ordered()
    harness.budget_bytes = harness.need(harness.everything, SHAPE) - 1
    assert not harness.controller.check(SHAPE)
    assert harness.mask == Plan()
    assert harness.controller.check(BatchShape(1, 10))


def test_an_empty_batch_that_does_not_fit_removes_all_that_the_guard_may():
    harness = ordered()
    harness.budget_bytes = 10
    assert not harness.controller.check(EMPTY_BATCH)
    assert harness.mask == harness.everything


def test_the_guard_shrinks_a_mask_that_does_not_fit():
    harness = Harness(policy=FakePolicy(Plan.removing(4)), guard_order=ORDER)
    expected = Plan.removing(4, 5, 0)
    harness.budget_bytes = harness.need(expected, SHAPE)
    assert harness.controller.admit(SHAPE)
    assert harness.mask == expected
    assert harness.controller.switcher.recent[-1].guarded


def test_the_policys_own_mask_is_taken_if_it_fits():
    mask = Plan.removing(1, 2, 3)
    harness = Harness(policy=FakePolicy(mask), guard_order=ORDER)
    harness.budget_bytes = harness.need(mask, SHAPE) + 10
    assert harness.controller.admit(SHAPE)
    assert harness.mask == mask
    assert not harness.controller.switcher.recent[-1].guarded
    assert harness.policy.asked[-1].budget_bytes == harness.budget_bytes


@pytest.mark.parametrize("said", [RuntimeError("no"), Plan.removing(99), None])
def test_a_policy_that_fails_is_replaced_by_the_guard(said, caplog):
    harness = Harness(policy=FakePolicy(said), guard_order=ORDER)
    harness.budget_bytes = between(harness, 3)
    assert harness.controller.admit(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:3])
    assert "'fake' failed" in caplog.text


def test_the_guard_uses_the_order_of_the_policy_or_the_freed_bytes():
    policy = FakePolicy(Plan())
    policy.order = ORDER
    harness = Harness(policy=policy)
    assert harness.controller.chooser.guard_order(SHAPE) == ORDER
    freed = harness.estimator.freed_bytes(SHAPE)
    by_bytes = Harness(policy=FakePolicy(Plan())).controller.chooser.guard_order(SHAPE)
    assert sorted(by_bytes) == list(range(6))
    assert [freed[index] for index in by_bytes] == sorted(freed, reverse=True)
    with pytest.raises(UnknownNameError, match=r"layer03\.attn"):
        Harness(guard_order=(6,))


def test_an_empty_order_disables_the_guard():
    mask = Plan.removing(0, 1)
    harness = Harness(policy=StaticPolicy(mask), guard_order=(), mask=mask)
    harness.budget_bytes = need = harness.need(mask, SHAPE)
    assert harness.controller.admit(SHAPE)
    harness.budget_bytes = need - 1
    assert not harness.controller.check(SHAPE)
    assert not harness.controller.admit(SHAPE)
    assert harness.mask == mask


@pytest.mark.parametrize("wrong", [{"hysteresis_share": 1.0}, {"hold_s": -1}, {"margin_share": -1}])
def test_settings_out_of_range_are_rejected(wrong):
    with pytest.raises(InvalidRequestError, match="must be from 0"):
        Harness(**wrong)


def test_unpredicted_bytes_are_learned_and_reserved():
    harness = ordered()
    harness.budget_bytes = between(harness, 2)
    harness.controller.admit(SHAPE)
    harness.meter.noise_bytes = 3 * 10**5
    harness.controller.observe(SHAPE, "prefill")
    learned = harness.controller.monitor.margin.bytes
    assert learned == pytest.approx(3 * 10**5 - harness.estimator.workspace_bytes(SHAPE), abs=10)
    harness.budget_bytes += learned
    assert harness.controller.check(SHAPE)
    assert len(harness.mask.removed) == 2


def test_measured_bytes_over_the_budget_remove_blocks_although_the_prediction_fits():
    harness = ordered()
    harness.budget_bytes = harness.need(Plan(), SHAPE)
    assert harness.controller.check(SHAPE)
    harness.meter.noise_bytes = harness.budget_bytes - harness.llm.held_bytes.total + 1000
    assert harness.controller.check(SHAPE)
    assert harness.mask
    assert harness.meter.used_bytes() <= harness.budget_bytes


def test_bytes_that_appear_during_a_switch_remove_more_blocks_at_once():
    harness = ordered()
    harness.budget_bytes = between(harness, 1)
    apply = harness.llm.apply_readable

    def noisy_apply(mask):
        errors = apply(mask)
        harness.meter.noise_bytes = (
            harness.budget_bytes - harness.estimator.peak_bytes(mask, EMPTY_BATCH) + 2000
        )
        return errors

    harness.llm.apply_readable = noisy_apply
    fits = harness.controller.check(SHAPE)
    assert harness.controller.switcher.switches > 1
    assert not fits or harness.meter.used_bytes() <= harness.budget_bytes


def test_a_pass_that_could_exceed_the_budget_removes_blocks_before_it_runs():
    harness = ordered()
    harness.budget_bytes = harness.need(Plan(), SHAPE)
    next_pass = PassSize(80, 160)
    assert harness.controller.check(SHAPE, next_pass)
    assert harness.mask
    estimate = harness.estimator.pass_estimate(harness.mask, SHAPE, next_pass)
    assert harness.meter.used_bytes() + estimate.total <= harness.budget_bytes


def test_while_idle_a_burst_expires_and_freed_memory_is_returned():
    harness = ordered()
    harness.meter.noise_bytes = 10**6
    harness.controller.observe(SHAPE, "decode")
    assert harness.controller.monitor.margin.bytes > 0
    harness.meter.noise_bytes = 0
    for _ in range(1100):
        harness.controller.check(EMPTY_BATCH)
    assert harness.controller.monitor.margin.bytes == 0


def test_a_source_that_fails_leaves_the_budget_as_it_was(caplog):
    harness = ordered()
    harness.controller.check(SHAPE)

    def fails(used_bytes):
        raise MemorySourceError("gone")

    harness.controller.monitor.source.budget_bytes = fails
    assert harness.controller.check(SHAPE)
    assert harness.controller.monitor.budget_bytes == harness.budget_bytes
    assert "stays at" in caplog.text


def test_decisions_are_logged_with_bytes_and_seconds(tmp_path):
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    harness = ordered(log=log)
    dense = harness.llm.held_bytes.total
    harness.budget_bytes = between(harness, 2)
    harness.time_s = 7.0
    harness.controller.check(SHAPE)
    record = json.loads(path.read_text())
    assert record["time_s"] == 7.0
    assert (record["from"], record["to"]) == ([], list(Plan.removing(*ORDER[:2]).removed_names))
    assert record["bytes_before"] == dense
    assert record["bytes_after"] == harness.llm.held_bytes.total < dense
    assert record["budget_bytes"] == harness.budget_bytes
    assert record["demand"] == {"batch_size": 4, "seq_len_tokens": 40}
    assert record["switch_s"] > 0
    assert harness.controller.switcher.lost_decisions == 0
    log.lost = 3
    assert harness.controller.switcher.lost_decisions == 3


def test_seconds_and_counts_add_up():
    harness = ordered()
    harness.budget_bytes = between(harness, 2)
    harness.controller.check(SHAPE)
    controller = harness.controller
    assert (controller.chooser.decisions, controller.switcher.switches) == (1, 1)
    assert 0 < controller.chooser.decision_s + controller.switcher.switch_s <= controller.overhead_s


def test_generate_stays_within_its_budget():
    harness = ordered()
    shape = BatchShape(2, 30)
    harness.controller.admit(shape)
    before, seen = harness.controller.before_step(shape), []
    budgets = iter([10**9] * 5 + [between(harness, 3, shape)] * 100)

    def step():
        harness.budget_bytes = next(budgets)
        before()
        seen.append((harness.llm.held_bytes.total, harness.budget_bytes))

    import torch

    ids = torch.full((2, 10), 7)
    harness.llm.generate(
        ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, before_step=step
    )
    assert len(harness.mask.removed) == 3
    assert all(held <= budget for held, budget in seen)
    harness.budget_bytes = 10
    with pytest.raises(InfeasibleBudgetError, match="raise the budget or generate less"):
        before()


def test_keys_and_values_in_use_count_as_used():
    harness = ordered(policy=StaticPolicy(Plan(), "dense"))
    batch = LiveBatch(harness.llm)
    batch.prefill([[5] * 40] * 4)
    harness.controller.check(SHAPE)
    assert harness.controller.monitor.used_bytes == harness.llm.held_bytes.total
    assert harness.controller.monitor.used_bytes > harness.llm.held_bytes.weights

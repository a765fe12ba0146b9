"""Fairness and recovery: what a newcomer may cost others, and how long a burst is remembered."""

from __future__ import annotations

import pytest

from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan
from rap_env.runtime.batch_shape import BatchShape, QualityBound
from rap_env.runtime.controller import IDLE_RESTORE_S
from rap_env.runtime.knapsack import KnapsackPolicy
from rap_env.runtime.memory_estimator import PassSize
from tests.runtime.harness import Harness, NoisyMeter, greedy, prompt
from tests.runtime.test_knapsack import costs
from tests.tiny import tiny_llm

NATIVE = CompressionPlan()
STREAMS, LONG_TOKENS, BURST_BYTES = 8, 44, 185_000


@pytest.fixture(scope="module")
def policy():
    """A knapsack with random costs, so that any lowered item costs more than the limit below."""
    memory = MemoryModel(tiny_llm(layers=3))
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


class BurstMeter(NoisyMeter):
    """Shows more bytes than predicted while `bursts` is true."""

    def used_bytes(self):
        self.noise_bytes = BURST_BYTES if self.bursts() else 0
        return super().used_bytes()

    def bursts(self):
        return False


def serve_streams(policy, *, limit, newcomer):
    """Eight streams, and beside them a long prompt that takes far more memory than predicted."""
    harness = Harness(policy=policy, meter=BurstMeter, max_degradation_by_newcomer=limit)
    engine = harness.engine(prefill_chunk_tokens=8, max_batch_size=STREAMS + 1)
    harness.budget_bytes = harness.need(NATIVE, BatchShape(STREAMS, 30)) + 9000
    streams = [engine.submit(prompt(6, n), greedy(16)) for n in range(STREAMS)]
    for _ in range(STREAMS + 1):
        engine.step()
        harness.time_s += 0.1
    assert engine.stats().running == STREAMS
    late = [engine.submit(prompt(LONG_TOKENS, 99), greedy(8))] if newcomer else []

    running = engine._scheduler
    harness.meter.bursts = lambda: late and late[0] in (s.handle for s in running.running)
    harness.run(engine)
    return harness, engine, streams, late


def test_streams_beside_a_long_prompt_are_as_without_it_and_60_s_later_nothing_is_lowered(policy):
    _, _, alone, _ = serve_streams(policy, limit=0.05, newcomer=False)
    harness, engine, streams, [late] = serve_streams(policy, limit=0.05, newcomer=True)
    assert [handle.token_ids for handle in streams] == [handle.token_ids for handle in alone]
    assert all(set(handle.plans) == {NATIVE} for handle in streams)
    assert late.reason == "length"
    assert harness.controller.monitor.margin.bytes > 0
    assert set(late.plans) != {NATIVE}
    ended_s = harness.time_s
    while harness.time_s < ended_s + 60:
        assert not engine.step()
        harness.time_s += 1.0
    assert harness.llm.plan == NATIVE


def test_without_the_limit_a_long_prompt_changes_the_answers_of_streams(policy):
    _, _, streams, _ = serve_streams(policy, limit=None, newcomer=True)
    assert any(set(handle.plans) != {NATIVE} for handle in streams)


def test_newcomers_together_raise_the_rise_of_a_running_request_by_no_more_than_the_limit(policy):
    worst = {}
    for limit in (2.5, None):
        harness = Harness(policy=policy, max_degradation_by_newcomer=limit)
        engine = harness.engine()
        harness.budget_bytes = harness.need(NATIVE, BatchShape(3, 24)) + 8000
        handles = [engine.submit(prompt(5, n), greedy(20)) for n in range(6)]
        harness.run(engine)
        assert all(handle.reason == "length" for handle in handles)
        worst[limit] = max(
            max(rises) - min(rises)
            for handle in handles
            if (rises := [policy.delta_nll(plan, 24) for plan in handle.plans])
        )
    assert 0 < worst[2.5] <= 2.5 < worst[None]  # two newcomers, each below 2.5, would be above it


def test_a_newcomer_may_join_under_the_plan_that_the_running_requests_have(policy):
    lowered = CompressionPlan.uniform(3, caches="int4")
    controller = Harness(policy=policy, max_degradation_by_newcomer=0.1).controller
    assert controller.newcomer_bound(20, 0.5) == QualityBound(20, 0.6)
    controller.llm.apply(lowered)
    rise = policy.delta_nll(lowered, 20)
    assert controller.newcomer_bound(20, 0.0) == QualityBound(20, rise)
    controller.chooser.policy.delta_nll, kept = lambda *_: None, policy.delta_nll
    controller.chooser.rise.cache_clear()
    try:
        assert controller.newcomer_bound(20, 0.0) is None
    finally:
        policy.delta_nll = kept


def test_a_request_that_waited_for_others_learns_of_the_limit(policy):
    harness = Harness(policy=policy, max_degradation_by_newcomer=0.0)
    engine = harness.engine(queue_timeout_s=1.0)
    harness.budget_bytes = harness.need(NATIVE, BatchShape(1, 40)) + 500
    first, second = (engine.submit(prompt(5, n), greedy(30)) for n in range(2))
    harness.run(engine)
    assert (first.reason, second.rejection) == ("length", "queue_timeout")
    assert "at most 0.0 nats per token through others (max_degradation_by_n" in second.error


def test_the_limit_is_checked(policy):
    for wrong, words in ((-0.1, "must be at least 0"), (float("nan"), "finite")):
        with pytest.raises(InvalidRequestError, match=f"max_degradation_by_newcomer .*{words}"):
            Harness(policy=policy, max_degradation_by_newcomer=wrong)
    with pytest.raises(InvalidRequestError, match="dense does not: choose such a policy"):
        Harness(max_degradation_by_newcomer=0.1)


def test_what_a_prefill_took_is_expected_of_prefills_alone(policy):
    harness = Harness(policy=policy)
    shape = BatchShape(4, 40)
    harness.budget_bytes = harness.need(NATIVE, shape) + 5000
    harness.meter.noise_bytes = 10**5
    harness.controller.observe(shape, "prefill")
    harness.meter.noise_bytes = 0
    harness.controller.note_preemption()
    assert harness.controller.check(shape, PassSize(4, 4, prefills=False))
    assert harness.llm.plan == NATIVE
    harness.controller.check(shape, PassSize(4, 4))
    assert harness.llm.plan != NATIVE


def test_an_engine_that_is_idle_for_long_restores_what_fits_without_a_reserve(policy):
    harness = Harness(policy=policy, hold_s=2.0, hysteresis_share=0.5)
    engine = harness.engine()
    need = harness.need(NATIVE, BatchShape())
    harness.budget_bytes = need - 1
    engine.step()
    assert harness.llm.plan != NATIVE
    harness.budget_bytes = int(1.1 * need)
    while harness.time_s < IDLE_RESTORE_S:
        engine.step()
        assert harness.llm.plan != NATIVE  # half of the budget is to stay spare
        harness.time_s += 5.0
    engine.step()
    assert harness.llm.plan == NATIVE

from __future__ import annotations

from rap_env.blocks import BlockMask
from rap_env.llm.live_batch import LiveBatch
from rap_env.runtime.demand import NOTHING, Demand
from rap_env.runtime.gauge import Gauge
from rap_env.runtime.margin import LearnedMargin
from rap_env.runtime.memory import GivenMemory
from rap_env.runtime.needs import Coming, Needs
from tests.runtime.stand import NoisyMeter
from tests.tiny import tiny_llm

DEMAND = Demand(2, 30)


def gauge(budget=10**6, **settings) -> Gauge:
    llm = tiny_llm()
    memory = GivenMemory(lambda: budget, **settings)
    return Gauge(llm, memory, NoisyMeter(llm), Needs(llm), LearnedMargin())


def test_what_masks_may_need_is_the_budget_without_the_margin():
    made = gauge()
    assert made.room_bytes(DEMAND, Coming(100, 100)) == 10**6
    made.margin.note("decode", 1234)
    assert made.room_bytes(DEMAND, Coming(100, 100)) == 10**6 - 1234


def test_where_a_pass_could_go_beyond_all_that_the_process_holds_counts():
    made = gauge()
    made.meter.noise_bytes = 5 * 10**5
    made.poll()
    workspace = Needs(tiny_llm()).workspace_bytes(DEMAND)
    assert made.room_bytes(DEMAND, Coming(1000, 0)) == 10**6
    tight = Coming(1000, 10**6)
    assert made.room_bytes(DEMAND, tight) == 10**6 - 5 * 10**5 - 1000 + workspace


def test_a_step_is_held_against_the_most_that_was_held_since_memory_was_given_back():
    made = gauge()
    batch = LiveBatch(made._llm)
    batch.prefill([[5] * 30] * 2)
    made.observe(DEMAND, "prefill")
    freed = batch.kv_bytes
    batch.close()
    made.meter.noise_bytes = freed  # the process keeps what was freed
    made.observe(DEMAND, "decode")
    assert made.margin.bytes == 0
    made.trim()
    made.observe(NOTHING, "decode")
    assert made.margin.bytes > 0


def test_other_threads_may_ask_for_the_limit_without_moving_the_budget():
    budgets = iter([100, 500, 300])
    llm = tiny_llm()
    made = Gauge(
        llm, GivenMemory(lambda: next(budgets)), NoisyMeter(llm), Needs(llm), LearnedMargin()
    )
    assert made.limit_bytes() == 500
    assert made.budget_bytes == 100
    made.poll()
    assert (made.budget_bytes, made.most_bytes) == (300, 500)


def test_a_source_that_knows_its_limit_is_believed():
    assert gauge(limit_bytes=7 * 10**6).limit_bytes() == 7 * 10**6


def test_what_comes_depends_on_the_blocks_that_are_kept():
    needs = Needs(tiny_llm())
    dense = needs.coming(BlockMask(), DEMAND, 8, 10)
    half = needs.coming(BlockMask.of(0), DEMAND, 8, 10)
    assert half.growth * 2 == dense.growth == 10 * sum(needs.memory.facts.kv_bytes_per_token)
    assert needs.coming(BlockMask(), DEMAND, 16, 10).workspace > dense.workspace
    assert needs.coming(BlockMask(), NOTHING, 0, 0).total == 0

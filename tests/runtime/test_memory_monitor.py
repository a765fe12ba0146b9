from __future__ import annotations

from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.runtime import memory_monitor
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate
from rap_env.runtime.memory_monitor import MemoryMonitor, SafetyMargin
from rap_env.runtime.memory_source import GivenMemory
from tests.runtime.harness import NoisyMeter
from tests.tiny import tiny_llm

SHAPE = BatchShape(2, 30)


def monitor(budget=10**6, **settings) -> MemoryMonitor:
    llm = tiny_llm()
    memory = GivenMemory(lambda: budget, **settings)
    return MemoryMonitor(llm, memory, NoisyMeter(llm), MemoryEstimator(llm), SafetyMargin())


def test_available_bytes_are_the_budget_less_the_margin():
    made = monitor()
    assert made.available_bytes(SHAPE, PassEstimate(100, 100)) == 10**6
    made.margin.observe("decode", 1234)
    assert made.available_bytes(SHAPE, PassEstimate(100, 100)) == 10**6 - 1234


def test_where_a_pass_could_exceed_the_budget_all_memory_of_the_process_counts():
    made = monitor()
    made.meter.noise_bytes = 5 * 10**5
    made.poll()
    workspace = MemoryEstimator(tiny_llm()).workspace_bytes(SHAPE)
    assert made.available_bytes(SHAPE, PassEstimate(1000, 0)) == 10**6
    tight = PassEstimate(1000, 10**6)
    assert made.available_bytes(SHAPE, tight) == 10**6 - 5 * 10**5 - 1000 + workspace


def test_a_step_is_compared_with_the_most_held_since_the_last_trim():
    made = monitor()
    batch = LiveBatch(made._llm)
    batch.prefill([[5] * 30] * 2)
    made.observe_step(SHAPE, "prefill")
    freed = batch.kv_bytes
    batch.close()
    made.meter.noise_bytes = freed  # the process keeps what was freed
    made.observe_step(SHAPE, "decode")
    assert made.margin.bytes == 0
    made.trim()
    made.observe_step(EMPTY_BATCH, "decode")
    assert made.margin.bytes > 0


def test_freed_memory_that_piles_up_is_returned_before_the_next_pass():
    made = monitor()
    kept, trims = memory_monitor._MOST_FREED_BYTES, []
    made.trim = lambda: trims.append(made.meter.noise_bytes) or MemoryMonitor.trim(made)
    made.meter.noise_bytes = kept // 2
    made.observe_step(SHAPE, "decode")
    assert trims == []
    made.meter.noise_bytes = 2 * kept
    made.observe_step(SHAPE, "decode")
    assert trims == [2 * kept]
    made.observe_step(SHAPE, "decode")  # the meter still shows it, so it is not freed memory
    assert trims == [2 * kept]
    made.meter.noise_bytes = 4 * kept
    made.observe_step(SHAPE, "decode")
    assert trims == [2 * kept, 4 * kept]


def test_reading_the_limit_does_not_change_the_budget():
    budgets = iter([100, 500, 300])
    llm = tiny_llm()
    made = MemoryMonitor(
        llm,
        GivenMemory(lambda: next(budgets)),
        NoisyMeter(llm),
        MemoryEstimator(llm),
        SafetyMargin(),
    )
    assert made.budget_limit_bytes() == 500
    assert made.budget_bytes == 100
    made.poll()
    assert (made.budget_bytes, made.max_budget_bytes) == (300, 500)


def test_the_limit_of_a_source_is_used():
    assert monitor(limit_bytes=7 * 10**6).budget_limit_bytes() == 7 * 10**6


def test_a_pass_estimate_depends_on_the_kept_blocks():
    estimator = MemoryEstimator(tiny_llm())
    dense = estimator.pass_estimate(Plan(), SHAPE, PassSize(8, 10))
    half = estimator.pass_estimate(Plan.removing(0), SHAPE, PassSize(8, 10))
    assert half.growth * 2 == dense.growth == 10 * sum(estimator.memory.facts.kv_bytes_per_token)
    assert estimator.pass_estimate(Plan(), SHAPE, PassSize(16, 10)).workspace > dense.workspace
    assert estimator.pass_estimate(Plan(), EMPTY_BATCH, PassSize(0, 0)).total == 0


def test_the_margin_is_the_largest_excess_over_a_prediction():
    margin = SafetyMargin(window=4)
    for beyond in (-50, 30, 10):
        margin.observe("decode", beyond)
    assert margin.bytes == 30


def test_the_margin_has_a_lower_bound():
    margin = SafetyMargin(least_bytes=20, window=2)
    margin.observe("decode", 5)
    assert margin.bytes == 20
    margin.observe("decode", 25)
    assert margin.bytes == 25


def test_a_single_burst_expires_within_two_windows():
    margin = SafetyMargin(window=10)
    margin.observe("decode", 100)
    seen = []
    for _ in range(20):
        margin.observe("decode", 7)
        seen.append(margin.bytes)
    assert seen[8] == 100
    assert seen[-1] == 7


def test_a_repeated_excess_does_not_expire():
    margin = SafetyMargin(window=10)
    for step in range(200):
        margin.observe("decode", 100 if step % 9 == 0 else 0)
        assert margin.bytes == 100


def test_each_kind_of_step_expires_separately():
    margin = SafetyMargin(window=4)
    margin.observe("prefill", 60)
    for _ in range(100):
        margin.observe("decode", 3)
    assert margin.bytes == 60


def test_an_excess_is_forgotten_after_a_time_even_without_steps():
    now = 0.0
    margin = SafetyMargin(least_bytes=5, window_s=10.0, clock=lambda: now)
    margin.observe("prefill", 60)
    margin.observe("decode", 40)
    assert (margin.bytes, margin.decode_bytes) == (60, 40)
    seen = {}
    for step in range(1, 26):
        now = float(step)
        if step % 9 == 0:
            margin.observe("decode", 30)
        margin.expire()
        seen[step] = (margin.bytes, margin.decode_bytes)
    assert seen[19] == (60, 40)
    assert seen[20] == (30, 30)  # the prefill is forgotten, repeated decode steps are not
    now = 100.0
    margin.expire()
    assert margin.bytes == 5

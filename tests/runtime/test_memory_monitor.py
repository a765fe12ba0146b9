"""How memory is measured, and what the monitor learns from it."""

import mmap
import sys
import threading
import time

import pytest
import torch

from rap_env.memory import MemoryModel
from rap_env.models.device import resident_bytes
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.weights.packing import buffer_bytes
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy, StaticPolicy
from rap_env.policies.uniform import uniform_plans
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import EMPTY_BATCH, BatchShape, MemoryEstimator
from rap_env.runtime.memory_limit import GivenMemory
from rap_env.runtime.memory_monitor import (
    MemoryMonitor,
    ResidentMeter,
    SafetyMargin,
    TensorMeter,
    make_levels,
    process_meter,
)
from rap_env.runtime.sampling import SamplingParams
from tests.runtime.harness import NoisyMeter, set_status
from tests.tiny import tiny_llm

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def touched(mib: int) -> mmap.mmap:
    memory = mmap.mmap(-1, mib * MIB)
    for _ in range(mib):
        memory.write(b"x" * MIB)  # in pieces: the heap may keep a large one
    return memory


def test_the_tensor_meter_is_exact_and_its_peak_restarts_at_each_call():
    llm = tiny_llm()
    meter = TensorMeter(llm)
    weights = llm.held_bytes.weights
    assert meter.used_bytes() == weights
    batch = LiveBatch(llm)
    batch.prefill([[3, 4, 5]])
    full = meter.used_bytes()
    assert full == weights + batch.kv_bytes
    batch.close()
    assert meter.used_bytes() == weights
    assert meter.peak_bytes() == full
    assert meter.peak_bytes() == weights


@linux
def test_the_process_is_measured_less_its_baseline():
    llm = tiny_llm()
    llm.apply(Plan.removing(0, 3))
    meter = process_meter(llm)
    assert isinstance(meter, ResidentMeter)
    assert llm.plan == Plan.removing(0, 3)  # making a meter changes neither mask nor caches
    assert llm.held_bytes.kv_cache == 0
    before = meter.used_bytes()
    assert abs(before - llm.held_bytes.total - buffer_bytes()) < 4 * MIB
    memory = touched(64)
    assert meter.used_bytes() - before > 60 * MIB
    memory.close()
    assert meter.used_bytes() - before < 30 * MIB
    assert meter.peak_bytes() - before > 60 * MIB


@linux
def test_the_mark_is_left_alone_and_samples_show_what_it_hides():
    touched(256).close()  # the mark is high already
    meter = ResidentMeter(tiny_llm())
    mark, before = resident_bytes()[0], meter.used_bytes()
    memory = touched(64)
    time.sleep(0.1)  # the work of a step
    memory.close()
    assert meter.peak_bytes() - before > 60 * MIB
    assert meter.peak_bytes() - before < 30 * MIB
    assert resident_bytes()[0] >= mark


@linux
def test_sampling_ends_with_the_meter():
    def sampling():
        return {thread for thread in threading.enumerate() if thread.name == "rap-memory-peak"}

    others = sampling()
    meter = ResidentMeter(tiny_llm())
    (thread,) = sampling() - others
    del meter
    thread.join(timeout=5)
    assert not thread.is_alive()


@linux
def test_an_idle_engine_takes_no_samples():
    llm = tiny_llm()
    meter = ResidentMeter(llm)
    engine = Engine(RuntimeController(llm, StaticPolicy(Plan()), 2**40, meter=meter))
    engine.start()
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=2)).result(timeout_s=30)
    assert engine.stats().kept_bytes > 0
    time.sleep(0.3)  # some looks at the budget
    sampled = [meter._sampler._sampling.is_set() for _ in range(40) if not time.sleep(0.01)]
    engine.close()
    assert sum(sampled) < 20


@linux
def test_a_baseline_that_has_shrunk_is_noticed_after_a_step(tmp_path):
    set_status(tmp_path, 500)
    llm = tiny_llm()
    meter = ResidentMeter(llm, process=tmp_path)
    made = MemoryMonitor(llm, GivenMemory(10**9), meter, MemoryEstimator(llm), SafetyMargin())
    held = llm.held_bytes.total
    set_status(tmp_path, 450)  # fifty of the baseline are gone
    assert meter.used_bytes() == 0
    meter.peak_bytes()
    assert made.observe_step(EMPTY_BATCH, "decode") == held
    model = held + buffer_bytes()
    assert meter.used_bytes() == model
    set_status(tmp_path, 453)
    assert made.observe_step(EMPTY_BATCH, "decode") == model + 3 * MIB
    assert meter.used_bytes() == model + 3 * MIB
    set_status(tmp_path, 460)  # more than a step may leave: what cannot be freed is not the model's
    assert made.observe_step(EMPTY_BATCH, "decode") == model + 10 * MIB
    assert meter.used_bytes() == model


@linux
def test_the_peak_is_the_mark_if_it_has_risen_else_the_largest_value_read(tmp_path):
    llm = tiny_llm()
    set_status(tmp_path, 100)
    meter = ResidentMeter(llm, process=tmp_path)
    model = llm.held_bytes.total + buffer_bytes()  # other tests may have widened weights
    for now_mib in (140, 120):
        set_status(tmp_path, now_mib)
        meter.used_bytes()
    assert meter.used_bytes() == model + 20 * MIB
    assert meter.peak_bytes() == model + 40 * MIB
    assert meter.peak_bytes() == model + 20 * MIB
    set_status(tmp_path, 120, mark_mib=950)  # between two samples
    assert meter.peak_bytes() == model + 850 * MIB
    assert meter.peak_bytes() == model + 20 * MIB


@pytest.mark.gpu
def test_on_a_cuda_device_temporary_tensors_count_in_the_peak():
    llm = tiny_llm()
    llm.model.to("cuda")
    meter = process_meter(llm)
    before = meter.used_bytes()
    block = torch.ones(16 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert meter.used_bytes() == before
    assert meter.peak_bytes() - before == 16 * MIB
    assert meter.peak_bytes() == before


def test_levels_are_made_once_before_a_service_starts_and_only_for_policies_that_use_them():
    llm = tiny_llm()
    llm.set_residency("offload")
    policy = OrderPolicy(MemoryModel(llm), (), uniform_plans(llm.facts))
    native = llm.held_bytes.weights
    make_levels(llm, StaticPolicy(Plan()))
    assert not any(item.made for item in llm.weight_items[:-1])
    make_levels(llm, policy)
    assert all({"int8", "int4"} <= set(item.made) for item in llm.weight_items[:-1])
    assert llm.plan == Plan()
    assert llm.held_bytes.weights == native  # levels are in files


SHAPE = BatchShape(2, 30)


def monitor(read=lambda: 10**6, **settings) -> MemoryMonitor:
    llm = tiny_llm()
    memory = GivenMemory(read, **settings)
    return MemoryMonitor(llm, memory, NoisyMeter(llm), MemoryEstimator(llm), SafetyMargin())


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


@pytest.mark.parametrize(
    ("excesses", "expected"),
    [
        ([-50, 30, 10], 30),  # the largest excess
        ([5, 25], 25),
        ([100, *[27] * 9], 100),
        ([100, *[27] * 20], 27),  # a single burst expires
        ([100 if step % 9 == 0 else 0 for step in range(200)], 100),  # a repeated one does not
    ],
)
def test_the_margin_is_the_largest_recent_excess_over_a_prediction(excesses, expected):
    now = 0.0
    margin = SafetyMargin(lambda: now)
    for excess in excesses:
        margin.observe("decode", excess)
        now += 4.0
    assert margin.bytes == expected
    margin.observe("prefill", 160)  # whatever other kinds of steps take
    for _ in range(100):
        margin.observe("decode", 3)
    assert margin.bytes == 160


def test_an_excess_is_forgotten_after_a_time_even_without_steps():
    now = 0.0
    margin = SafetyMargin(lambda: now)
    margin.observe("prefill", 60)
    margin.observe("decode", 40)
    assert (margin.bytes, margin.decode_bytes) == (60, 40)
    for step in range(1, 12):
        assert (margin.bytes, margin.decode_bytes) == (60, 40)
        now = 4.0 * step
        if step % 9 == 0:
            margin.observe("decode", 30)
        margin.expire()
    assert (margin.bytes, margin.decode_bytes) == (30, 30)  # the prefill is forgotten
    now = 400.0
    margin.expire()
    assert margin.bytes == 0

from __future__ import annotations

import mmap
import sys
import threading
import time

import pytest

from rap_env.errors import MemorySourceError
from rap_env.memory import MemoryModel
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.weights.packed_layout import buffer_bytes
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.policies.uniform import UniformPolicy, uniform_plans
from rap_env.runtime.memory_meter import (
    ResidentMeter,
    TensorMeter,
    make_levels,
    process_meter,
    resident_bytes,
)
from tests.runtime.harness import set_status
from tests.tiny import tiny_llm

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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
    meter = process_meter(llm)
    assert isinstance(meter, ResidentMeter)
    before = meter.used_bytes()
    assert abs(before - llm.held_bytes.total - buffer_bytes()) < 4 * MIB
    touched = mmap.mmap(-1, 64 * MIB)
    for _ in range(64):
        touched.write(b"x" * MIB)  # in pieces: the heap may keep a large one
    assert meter.used_bytes() - before > 60 * MIB
    touched.close()
    assert meter.used_bytes() - before < 30 * MIB
    assert meter.peak_bytes() - before > 60 * MIB


@linux
def test_a_mark_that_is_reset_restarts_at_each_call():
    meter = ResidentMeter(tiny_llm(), reset_mark=True)
    touched = mmap.mmap(-1, 64 * MIB)
    for _ in range(64):
        touched.write(b"x" * MIB)  # in pieces: the heap may keep a large one
    touched.close()
    first, second = meter.peak_bytes(), meter.peak_bytes()
    assert first - second > 40 * MIB


@linux
def test_by_default_the_mark_is_left_alone_and_samples_show_what_it_hides():
    touched = mmap.mmap(-1, 256 * MIB)  # the mark is high already
    touched.write(b"x" * (256 * MIB))
    touched.close()
    meter = ResidentMeter(tiny_llm())
    mark, before = resident_bytes()[0], meter.used_bytes()
    touched = mmap.mmap(-1, 64 * MIB)
    touched.write(b"x" * (64 * MIB))
    time.sleep(0.1)  # the work of a step
    touched.close()
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
def test_held_tensors_correct_a_baseline_that_is_too_high(tmp_path):
    set_status(tmp_path, 500)
    llm = tiny_llm()
    meter = ResidentMeter(llm, process=tmp_path)
    held = llm.held_bytes.total
    set_status(tmp_path, 450)  # fifty of the baseline are gone
    assert meter.used_bytes() == 0
    meter.correct_baseline(held)
    assert meter.used_bytes() == held
    set_status(tmp_path, 460)
    assert meter.used_bytes() == held + 10 * MIB
    meter.correct_baseline(held)
    assert meter.used_bytes() == held + 10 * MIB


@linux
def test_a_meter_at_rest_takes_no_samples(tmp_path):
    set_status(tmp_path, 100)
    meter = ResidentMeter(tiny_llm(), process=tmp_path)
    for rests in (True, False):
        before = meter.used_bytes()
        if rests:
            meter.rest()
            time.sleep(0.03)
        set_status(tmp_path, 200)
        time.sleep(0.1)
        set_status(tmp_path, 100)
        assert meter.peak_bytes() - before == (0 if rests else 100 * MIB)


@linux
@pytest.mark.parametrize("reset_mark", [False, True])
def test_the_peak_is_the_mark_if_it_has_risen_else_the_largest_value_read(tmp_path, reset_mark):
    (tmp_path / "clear_refs").mkdir()  # cannot be written to
    llm = tiny_llm()
    set_status(tmp_path, 100)
    meter = ResidentMeter(llm, process=tmp_path, reset_mark=reset_mark)
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


@linux
def test_a_process_that_cannot_be_read_is_rejected(tmp_path):
    with pytest.raises(MemorySourceError, match="use TensorMeter"):
        ResidentMeter(tiny_llm(), process=tmp_path / "none")


def test_making_a_meter_changes_neither_mask_nor_caches():
    llm = tiny_llm()
    llm.apply(Plan.removing(0, 3))
    process_meter(llm)
    assert llm.mask == Plan.removing(0, 3)
    assert llm.held_bytes.kv_cache == 0


@pytest.mark.gpu
def test_on_a_cuda_device_temporary_tensors_count_in_the_peak():
    import torch

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
    policy = UniformPolicy(MemoryModel(llm), uniform_plans(llm.facts))
    native = llm.held_bytes.weights
    make_levels(llm, StaticPolicy(Plan()))
    assert llm.held_bytes.weights == native
    make_levels(llm, policy)
    held = llm.held_bytes.weights
    assert llm.plan == Plan()
    assert held > native  # resident weights keep all levels
    make_levels(llm, policy)
    assert llm.held_bytes.weights == held

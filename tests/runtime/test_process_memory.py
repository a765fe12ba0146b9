"""The budget that a limit on the whole process leaves for the model."""

from __future__ import annotations

import sys

import pytest

from rap_env.models.weights.packed_layout import buffer_bytes
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.memory_meter import ResidentMeter
from rap_env.runtime.memory_source import HEADROOM_BYTES, ProcessMemory
from tests.runtime.harness import set_status
from tests.tiny import tiny_llm

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def process(tmp_path):
    """A folder in the place of /proc/self, and a function that sets the resident memory."""

    def write(now_mib):
        set_status(tmp_path, now_mib)

    write(500)
    return tmp_path, write


def test_the_budget_is_what_the_limit_leaves_beside_everything_else(process):
    folder, write = process
    llm = tiny_llm()
    meter = ResidentMeter(llm, process=folder)
    memory = ProcessMemory(600 * MIB, meter)
    held = llm.held_bytes.total
    other = memory.other_bytes
    assert other <= 500 * MIB - held
    assert memory.budget_bytes(0) == 600 * MIB - HEADROOM_BYTES - other
    write(540)
    memory.measure_others(held)
    assert memory.other_bytes == other + 40 * MIB
    write(900)
    memory.measure_others(held)
    assert memory.budget_bytes(0) == 0


def test_the_limit_may_move(process):
    limits = [600 * MIB]
    memory = ProcessMemory(lambda: limits[0], ResidentMeter(tiny_llm(), process=process[0]))
    before = memory.budget_bytes(0)
    limits[0] += 50 * MIB
    assert memory.process_bytes == 650 * MIB
    assert memory.budget_bytes(0) == before + 50 * MIB


def test_growth_of_the_rest_counts_as_used_and_at_rest_lowers_the_budget(process):
    folder, write = process
    llm = tiny_llm()
    meter = ResidentMeter(llm, process=folder)
    memory = ProcessMemory(600 * MIB, meter)
    controller = RuntimeController(llm, StaticPolicy(llm.mask), memory, meter=meter)
    monitor = controller.monitor
    budget, shape = monitor.budget_bytes, BatchShape(1, 8)
    write(530)  # the server has grown
    controller.check(shape)
    assert monitor.budget_bytes == budget
    assert monitor.used_bytes >= 30 * MIB
    controller.observe(shape)
    controller.check(BatchShape(0, 0))
    assert monitor.budget_bytes == budget - 30 * MIB
    assert monitor.used_bytes < MIB + buffer_bytes()

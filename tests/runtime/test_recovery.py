"""How long a burst of memory is remembered, and what an idle engine restores."""

from __future__ import annotations

import pytest

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.batch_shape import BatchShape, PassSize
from rap_env.runtime.controller import IDLE_RESTORE_S
from tests.policies.test_knapsack import costs
from tests.runtime.harness import Harness
from tests.tiny import tiny_llm

NATIVE = Plan()


@pytest.fixture(scope="module")
def policy():
    """A knapsack with random costs."""
    memory = MemoryModel(tiny_llm(layers=3))
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


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

"""Plans at runtime: levels are lowered before blocks are removed, and raised again."""

import itertools

import pytest

from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy
from rap_env.policies.uniform import uniform_plans
from rap_env.request import Request
from rap_env.runtime.memory_estimator import BatchShape, MemoryEstimator
from tests.runtime.harness import ORDER, Harness, prompt
from tests.tiny import tiny_llm

LONG = BatchShape(3, 60)
LAYERS = 16
PLANS = (
    Plan(),
    Plan.uniform(3, caches="int4"),
    Plan.uniform(3, caches="int4", weights="int4"),
    Plan.uniform(3, caches="int4", weights="int4").without(1, 2),
)


def lowering(**settings) -> Harness:
    """A harness whose policy lowers caches, then weights, then removes blocks.

    It has so many layers that their caches outweigh the workspace of attention over one of them.
    """
    harness = Harness(guard_order=ORDER, layers=LAYERS, **settings)
    memory = harness.estimator.memory
    policy = OrderPolicy(memory, ORDER, uniform_plans(memory.facts))
    harness.controller.chooser.policy = policy
    return harness


@pytest.mark.parametrize(
    "plan",
    [*PLANS, *(Plan.removing(*b) for b in [(0,), (1, 2), (0, 2, 4), (1, 3, 5), range(6)])],
    ids=str,
)
def test_estimates_cover_the_held_bytes_of_plans(plan):
    llm = tiny_llm(layers=3)
    llm.set_residency("offload")
    estimator = MemoryEstimator(llm)
    need = estimator.peak_bytes(plan, LONG)
    llm.apply(plan)
    batch = LiveBatch(llm)
    batch.prefill([prompt(60, n) for n in range(3)])
    held = llm.held_bytes.total
    more = estimator.memory.facts.widen_bytes
    more += estimator.memory.attention_workspaces(*LONG.at_least_one)
    assert need == estimator.peak_bytes(plan, LONG)  # levels in use are not counted twice
    assert held <= need <= held + estimator.workspace_bytes(LONG) + more


def test_a_falling_budget_lowers_caches_then_weights_then_removes_blocks():
    harness = lowering()
    plans = uniform_plans(harness.llm.facts)
    needs = [harness.need(plan, LONG) for plan in plans]
    between = [(more + less) // 2 for more, less in itertools.pairwise(needs)]
    seen = []
    for budget in [needs[0], *between, needs[-1] - 1]:
        harness.budget_bytes = budget
        assert harness.check(LONG)
        assert harness.need(harness.llm.plan, LONG) <= budget
        seen.append(harness.llm.plan)
    assert seen[:-1] == plans
    assert seen[-1] == plans[-1].without("layer02.ffn")


def test_a_policy_of_plans_is_asked_for_less_before_the_guard_removes_blocks():
    harness = lowering()
    plan = Plan.uniform(LAYERS, caches="int8")
    memory_need = harness.estimator.memory.peak_bytes(plan, Request(3, 60, 1))
    # The memory model does not count the copy of a layer, so its choice does not fit.
    harness.budget_bytes = memory_need
    assert harness.need(plan, LONG) > memory_need
    assert harness.admit(LONG)
    assert not harness.mask
    assert harness.llm.plan in uniform_plans(harness.llm.facts)
    assert harness.need(harness.llm.plan, LONG) <= harness.budget_bytes

"""The longest prompt that fits a budget."""

from __future__ import annotations

import pytest

from rap_env.errors import InfeasibleBudgetError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.batch_shape import BatchShape
from tests.policies.test_knapsack import costs
from tests.runtime.harness import Harness, greedy, prompt
from tests.tiny import tiny_llm

SHAPE = BatchShape(1, 30)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_it_is_the_longest_that_some_allowed_plan_fits(floor):
    memory = MemoryModel(tiny_llm(layers=3))
    policy = KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))
    harness = Harness(policy=policy, max_delta_nll=floor)
    engine = harness.engine()
    assert engine.longest_prompt.tokens() == 63  # all positions but one
    monitor = harness.controller.monitor
    smallest = policy.choose(SHAPE.request(1))
    for plan, longest in ((Plan(), 63), (smallest, 30)):
        harness.budget_bytes = monitor.max_budget_bytes = harness.need(plan, SHAPE)
        if floor is not None:
            longest = 0 if plan == smallest else 30
        assert engine.longest_prompt.tokens() == longest
        if longest < 63:
            with pytest.raises(InfeasibleBudgetError):
                engine.submit(prompt(longest + 1), greedy(1))

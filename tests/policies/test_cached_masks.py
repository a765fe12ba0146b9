"""The packaged policy over masks, on the bytes of a model with int8 caches. No model is loaded."""

from types import SimpleNamespace

import pytest

from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import make_method
from rap_env.policies.packaged_files import default_facts
from rap_env.request import Request

SHAPES = ((1, 128), (8, 2048), (16, 4096))


@pytest.fixture(scope="module")
def memory() -> MemoryModel:
    return MemoryModel(default_facts())


@pytest.fixture(scope="module")
def baseline(memory) -> Policy:
    ladder_bytes = LadderBytes(memory, Ladder.of(memory.facts, "all"))
    return make_method("rap-v0", SimpleNamespace(memory=memory), ladder_bytes)


def uniform(memory, level: str) -> Plan:
    return Plan.uniform(memory.facts.num_layers, caches=level)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_removes_blocks_only_where_int8_caches_do_not_suffice(memory, baseline, shape):
    int8 = memory.peak_bytes(uniform(memory, "int8"), Request(*shape, budget_bytes=1))
    assert baseline.choose(Request(*shape, budget_bytes=int8)) == uniform(memory, "int8")
    tight = Request(*shape, budget_bytes=int(0.9 * int8))
    plan = baseline.choose(tight)
    assert plan.removed
    assert {level.name for _, level in plan.caches} == {"int8"}
    assert memory.peak_bytes(plan, tight) <= tight.budget_bytes
    assert baseline.choose(Request(*shape, memory.dense_peak_bytes(*shape))) == Plan()
    assert baseline.evaluations == 0


def test_every_budget_of_the_ladder_is_met_or_answered_with_the_smallest_plan(memory, baseline):
    for shape in SHAPES:
        everything = Plan.removing(*range(memory.facts.num_blocks))
        least = memory.peak_bytes(everything, Request(*shape, budget_bytes=1))
        plan = baseline.choose(Request(*shape, budget_bytes=least))
        assert plan.removed == everything.removed

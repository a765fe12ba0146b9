"""The quality floor, the longest prompt within it, and what an idle engine restores."""

from types import SimpleNamespace

import pytest

from rap_env.errors import InvalidRequestError, QualityFloorError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.memory_estimator import BatchShape
from tests.policies.test_knapsack import costs
from tests.runtime.harness import (
    ORDER,
    PLENTY,
    SHAPE,
    FakePolicy,
    Harness,
    greedy,
    prompt,
    serve_while_the_budget_jumps,
    steps,
)
from tests.tiny import tiny_llm

NATIVE = Plan()


@pytest.fixture(scope="module")
def policy():
    """A knapsack with random costs of all levels of the harness's model."""
    memory = MemoryModel(tiny_llm(layers=3))
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


def worst(policy, handles) -> float:
    """The largest rise in NLL that is predicted for a plan of any token."""
    return max(policy.delta_nll(p, handle.final_tokens) for handle in handles for p in handle.plans)


def test_a_plan_is_applied_only_above_the_floor(policy):
    floored, free = (Harness(policy=policy, max_delta_nll=floor) for floor in (2.0, None))
    top, least = (floored.need(plan, SHAPE) for plan in (NATIVE, floored.everything))
    outcomes = set()
    for budget in range(top, least, (least - top) // 12):
        floored.budget_bytes = free.budget_bytes = budget
        admitted = floored.controller.admit(SHAPE)
        assert free.controller.admit(SHAPE)
        assert admitted == (policy.delta_nll(free.llm.plan, 40) <= 2.0)
        if admitted:
            assert floored.llm.plan == free.llm.plan
        outcomes.add(admitted)
    assert outcomes == {True, False}


def served(policy, floor):
    """An engine's answers while its budget jumps between what is plenty and almost nothing."""
    harness = Harness(policy=policy, max_delta_nll=floor, hold_s=0.3)
    engine = harness.engine(prefill_chunk_tokens=4, max_batch_size=4)
    top = harness.need(NATIVE, BatchShape(4, 40))
    return serve_while_the_budget_jumps(harness, engine, int(0.2 * top), top)


def test_no_token_is_computed_below_the_floor_while_the_budget_jumps(policy):
    floored = served(policy, 2.0)
    assert 0 < worst(policy, floored) <= 2.0
    assert any(handle.preemptions for handle in floored)
    assert worst(policy, served(policy, None)) > 2.0


def test_a_request_that_waited_for_a_plan_above_the_floor_learns_why(policy):
    harness = Harness(policy=policy, max_delta_nll=0.0)
    engine = harness.engine(queue_timeout_s=1.0)
    handle = engine.submit(prompt(5), greedy(20))
    harness.budget_bytes = budget = harness.need(NATIVE, BatchShape(1, 24)) - 1
    assert not engine.step()
    assert not handle.done
    harness.time_s = 1.1
    assert not engine.step()
    assert handle.rejection == "below_floor"
    assert "longer than 1.0 s" in handle.error
    assert f"{budget:,} bytes" in handle.error
    assert "max_delta_nll" in handle.error


def test_a_plan_below_the_floor_serves_nothing(policy):
    harness = Harness(policy=policy, max_delta_nll=0.0)
    engine = harness.engine()
    handle = engine.submit(prompt(5), greedy(20))
    steps(engine, 3)
    harness.llm.apply(Plan.removing(1))  # from outside
    harness.run(engine)
    assert set(handle.plans) == {NATIVE}
    # The plan of an idle engine may be below the floor.
    harness.budget_bytes = harness.llm.held_bytes.total // 2
    engine.step()
    assert harness.llm.held_bytes.total <= harness.budget_bytes
    assert harness.llm.plan
    harness.budget_bytes = harness.need(NATIVE, BatchShape(1, 24)) - 1
    handle = engine.submit(prompt(5), greedy(20))
    assert not engine.step()
    assert handle.preemptions == 0  # it was not admitted
    harness.budget_bytes = PLENTY
    harness.run(engine)
    assert set(handle.plans) == {NATIVE}


def test_a_plan_that_spares_a_running_batch_a_refill_is_above_the_floor_too():
    before, said = Plan.removing(0), Plan.removing(1, 2, 3, 5)
    policy = FakePolicy(said)
    policy.delta_nll = lambda plan, tokens: 1.0 if before.removed < plan.removed else 0.1
    harness = Harness(policy=policy, guard_order=ORDER, mask=before, max_delta_nll=0.5)
    harness.budget_bytes = harness.need(said, SHAPE)
    assert not harness.controller.check(SHAPE)  # block 0 would stay removed besides others
    assert harness.mask == before
    assert harness.controller.admit(SHAPE)
    assert harness.mask == said


def test_the_floor_holds_at_the_length_of_the_longest_request():
    lowered = FakePolicy(Plan.uniform(3, caches="int4"))
    lowered.delta_nll = lambda plan, tokens: tokens / 1000 if plan else 0.0
    chooser = Harness(policy=lowered, max_delta_nll=0.2).controller.chooser
    shape = BatchShape.of([(100, 10)] * 10 + [(100, 400)])
    assert (shape.seq_len_tokens, shape.longest_tokens) == (110, 500)
    assert not chooser.allows(lowered.mask, shape)
    assert chooser.allows(lowered.mask, BatchShape.of([(100, 10)] * 10))
    assert chooser.allows(lowered.mask, BatchShape())
    lowered.delta_nll = lambda *_: None  # a plan without a prediction is below any floor
    unknown = Plan.uniform(3, weights="int4")
    assert not chooser.allows(unknown, BatchShape(1, 10))


def test_a_floor_is_a_rise_and_needs_a_policy_that_predicts(policy):
    for floor in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match="max_delta_nll must be at least 0"):
            Harness(policy=policy, max_delta_nll=floor)
    mute = SimpleNamespace(name="mute", choose=lambda request: NATIVE)
    with pytest.raises(InvalidRequestError, match=r"needs a policy .* mute does not"):
        Harness(policy=mute, max_delta_nll=0.1)


def fills(policy, rows, tokens, share):
    """A harness whose budget fits `rows` requests with a plan that is lowered by a share."""
    harness = Harness(policy=policy)
    shape = BatchShape(rows, tokens)
    top, least = (harness.need(plan, shape) for plan in (NATIVE, harness.everything))
    harness.budget_bytes = int(top - share * (top - least))
    return harness


def test_a_request_for_which_the_floor_is_out_of_reach_is_rejected_with_the_least_rise(policy):
    harness = fills(policy, 1, 24, 0.3)
    harness.controller.monitor.max_budget_bytes = harness.budget_bytes
    chooser, engine = harness.controller.chooser, harness.engine()
    best = chooser.least_rise(BatchShape(1, 24), harness.budget_bytes)
    assert best > 0
    chooser.max_delta_nll = chooser.most_delta_nll = 0.0
    words = rf"at most 0.0 nats .* \(max_delta_nll\).* has {best:.4g}"
    with pytest.raises(QualityFloorError, match=words):
        engine.submit(prompt(5), greedy(20))
    chooser.max_delta_nll = chooser.most_delta_nll = best
    assert engine.submit(prompt(5), greedy(20))

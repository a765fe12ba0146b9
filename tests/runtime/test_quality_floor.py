"""The quality floor, the longest prompt within it, and what an idle engine restores."""

from types import SimpleNamespace

import pytest

from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.controller import IDLE_RESTORE_S
from rap_env.runtime.memory_estimator import BatchShape, PassSize
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
    assert not harness.check(SHAPE)  # block 0 would stay removed besides others
    assert harness.mask == before
    assert harness.admit(SHAPE)
    assert harness.mask == said


def test_the_floor_holds_at_the_length_of_the_longest_request():
    lowered = FakePolicy(Plan.uniform(3, caches="int4"))
    lowered.delta_nll = lambda plan, tokens: tokens / 1000 if plan else 0.0
    chooser = Harness(policy=lowered, max_delta_nll=0.2).controller.chooser
    shape = BatchShape.of([(100, 10)] * 10 + [(100, 400)])
    assert (shape.seq_len_tokens, shape.longest_tokens) == (110, 500)
    assert not chooser.allows(lowered.mask, shape, 0.2)
    assert chooser.allows(lowered.mask, BatchShape.of([(100, 10)] * 10), 0.2)
    assert chooser.allows(lowered.mask, BatchShape(), 0.2)
    lowered.delta_nll = lambda *_: None  # a plan without a prediction is below any floor
    unknown = Plan.uniform(3, weights="int4")
    assert not chooser.allows(unknown, BatchShape(1, 10), 0.2)


def test_a_floor_is_a_rise_and_needs_a_policy_that_predicts(policy):
    for floor in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match="max_delta_nll must be at least 0"):
            Harness(policy=policy, max_delta_nll=floor)
    mute = SimpleNamespace(name="mute", choose=lambda request: NATIVE)
    with pytest.raises(InvalidRequestError, match=r"needs a policy .* mute does not"):
        Harness(policy=mute, max_delta_nll=0.1)
    with pytest.raises(InvalidRequestError, match="needs a policy that predicts"):
        Harness(policy=mute).engine().submit(prompt(5), greedy(2, max_delta_nll=1.0))


def fills(policy, rows, tokens, share):
    """A harness whose budget fits `rows` requests with a plan that is lowered by a share."""
    harness = Harness(policy=policy)
    shape = BatchShape(rows, tokens)
    top, least = (harness.need(plan, shape) for plan in (NATIVE, harness.everything))
    harness.budget_bytes = int(top - share * (top - least))
    return harness


def test_the_plan_of_a_batch_obeys_the_strictest_floor_of_its_requests(policy):
    harness = fills(policy, 3, 24, 0.1)  # predicted for 2 rows: 0; for 3: 0.6; for 4: 3.1
    engine = harness.engine()
    floors = (None, 2.0, None, 0.3, None, None)
    handles = [
        engine.submit(prompt(5, n), greedy(20, max_delta_nll=floor))
        for n, floor in enumerate(floors)
    ]
    beside_strict = []

    def watch(_turn):
        if handles[3].token_ids and not handles[3].done:
            beside_strict.append(engine.stats().running)

    harness.run(engine, before=watch)
    assert all(handle.reason == "length" for handle in handles)
    assert 0.3 < worst(policy, handles[:1]) <= 2.0
    assert worst(policy, handles[1:2]) <= 2.0
    assert worst(policy, handles[3:4]) == 0
    assert max(beside_strict) == 2  # a third would lower the plan below the strict floor


def test_a_request_that_waits_for_its_own_floor_does_not_hold_up_others(policy):
    harness = fills(policy, 1, 24, 0.3)
    low, harness.budget_bytes = harness.budget_bytes, PLENTY
    engine = harness.engine(queue_timeout_s=5.0)
    engine.step()
    harness.budget_bytes = low
    engine.step()
    strict = engine.submit(prompt(5), greedy(20, max_delta_nll=0.0))
    lax = engine.submit(prompt(6), greedy(20))
    harness.run(engine)
    assert (strict.reason, lax.reason) == (None, "length")
    harness.budget_bytes = PLENTY
    engine.step()  # reads the budget
    harness.run(engine)
    assert set(strict.plans) == {NATIVE}


def test_what_a_prefill_took_is_expected_of_prefills_alone(policy):
    harness = Harness(policy=policy)
    shape = BatchShape(4, 40)
    harness.budget_bytes = harness.need(NATIVE, shape) + 5000
    harness.meter.noise_bytes = 10**5
    harness.controller.monitor.observe_step(shape, "prefill")
    harness.meter.noise_bytes = 0
    harness.controller.monitor.trim()
    assert harness.check(shape, PassSize(4, 4, prefills=False))
    assert harness.llm.plan == NATIVE
    harness.check(shape, PassSize(4, 4))
    assert harness.llm.plan != NATIVE


def test_an_engine_that_is_idle_for_long_restores_what_fits_without_a_reserve(policy):
    harness = Harness(policy=policy, hold_s=2.0, spare_share=0.5)
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

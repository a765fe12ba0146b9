"""Rows of one batch with caches of different levels, and refills of lowered ones."""

import torch

from rap_env.plan import Plan
from rap_env.runtime import decision
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.scheduler import Pace
from tests.runtime.harness import FakePolicy, Harness, alone, greedy, prompt

INT4 = Plan.uniform(3, caches="int4")


def lowered_rows(engine):
    """Decoding rows whose caches have lower levels than the plan."""
    return sum(own != engine.llm.plan for own in engine._scheduler.batch.rows.plans)


def squeezed(new: int = 23, disk=False, **settings):
    """An engine with a row whose caches are lowered, at the moment when memory is back."""
    policy = FakePolicy(INT4)
    harness = Harness(policy=policy, mask=INT4, hold_s=0.3, disk=disk)
    engine = harness.engine(prefill_chunk_tokens=16, **settings)
    first = engine.submit(prompt(40), greedy(new))
    while len(first.token_ids) < 2:
        engine.step()
    assert lowered_rows(engine) == 0
    assert harness.llm.plan == INT4
    policy.mask = Plan()
    return harness, engine, first


def turns(harness, engine, count: int) -> None:
    for _ in range(count):
        engine.step()
        harness.time_s += 0.1


def test_a_row_that_joins_after_memory_is_back_is_native_beside_older_ones(monkeypatch):
    monkeypatch.setattr(decision, "TOKEN_NATS", 1.0)  # no refill pays
    harness, engine, first = squeezed()
    turns(harness, engine, 5)
    assert harness.llm.plan == Plan()
    second = engine.submit(prompt(36, 1), greedy(8))
    harness.run(engine)
    assert set(second.plans) == {Plan()}
    assert second.token_ids == alone(harness.llm, prompt(36, 1), 8)
    assert first.plans[-1].caches  # it says which levels its own caches have
    assert first.reason == "length"
    assert engine.stats().refilled_tokens == 0


def test_a_row_gets_its_native_cache_back_from_a_file_where_a_disk_is_allowed():
    harness, engine, first = squeezed(disk=True)
    second = engine.submit(prompt(36, 1), greedy(8))
    while not second.token_ids:
        engine.step()
    assert harness.llm.plan == INT4
    lowered_bytes = harness.llm.held_bytes.kv_cache
    turns(harness, engine, 4)
    assert harness.llm.plan == Plan()
    assert harness.llm.held_bytes.kv_cache > lowered_bytes
    assert lowered_rows(engine) == 0
    harness.run(engine)
    for handle in (first, second):
        back = handle.plans.index(Plan())
        assert set(handle.plans[back:]) == {Plan()}
        assert handle.reason == "length"
    assert engine.stats().refilled_tokens == 0
    assert harness.llm.held_bytes.kv_cache == 0


def test_a_lowered_row_is_refilled_while_it_decodes():
    harness, engine, first = squeezed()
    turns(harness, engine, 4)
    assert lowered_rows(engine) == 1
    before = len(first.token_ids)
    turns(harness, engine, 4)
    assert lowered_rows(engine) == 0
    assert len(first.token_ids) == before + 4  # no turn went without a token
    back = first.plans.index(Plan())
    ids = prompt(40) + first.token_ids[:back]
    harness.run(engine)
    assert first.token_ids[back:] == alone(harness.llm, ids, 23 - back)
    assert 40 < engine.stats().refilled_tokens <= 40 + back


def test_rows_get_removed_attention_back_one_at_a_time_while_they_decode():
    policy = FakePolicy(Plan.removing(2))
    harness = Harness(policy=policy, mask=Plan.removing(2), hold_s=0.3, disk=False)
    engine = harness.engine(prefill_chunk_tokens=16)
    handles = [engine.submit(prompt(30, n), greedy(30)) for n in range(2)]
    while len(handles[1].token_ids) < 2:
        engine.step()
    policy.mask = Plan()
    before = [len(handle.token_ids) for handle in handles]
    turns(harness, engine, 12)
    assert harness.llm.plan == Plan()
    assert [len(handle.token_ids) for handle in handles] == [count + 12 for count in before]
    assert max(record.rows for record in harness.records if record.kind == "prefill") == 1
    assert lowered_rows(engine) == 0
    backs = [handle.plans.index(Plan()) for handle in handles]
    assert backs[0] != backs[1]
    harness.run(engine)
    for n, handle in enumerate(handles):
        back = backs[n]
        assert set(handle.plans[:back]) == {Plan.removing(2)}
        without = alone(harness.llm, prompt(30, n), back, Plan.removing(2))
        assert handle.token_ids[:back] == without
        ids = prompt(30, n) + without
        assert handle.token_ids[back:] == alone(harness.llm, ids, 30 - back)


def test_a_row_that_ends_soon_is_not_refilled():
    harness, engine, first = squeezed(new=7)
    harness.run(engine)
    assert engine.stats().refilled_tokens == 0
    assert first.plans[-1].caches


def test_a_refill_ends_where_memory_falls_and_its_request_goes_on():
    harness, engine, first = squeezed()
    while not engine._scheduler.batch.refilling:
        turns(harness, engine, 1)
    harness.budget_bytes = harness.need(Plan(), BatchShape(1, 62))
    turns(harness, engine, 1)
    assert not engine._scheduler.batch.refilling
    assert first.preemptions == 0
    harness.run(engine)
    assert first.reason == "length"


def test_a_refill_that_fails_is_given_up(caplog):
    harness, engine, first = squeezed()
    forward = harness.llm.model.forward

    def failing(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    harness.llm.model.forward = failing
    harness.run(engine)
    assert (first.reason, first.preemptions) == ("length", 0)
    assert "could not be computed again: no memory" in caplog.text


def test_decode_steps_follow_a_chunk_by_the_target():
    pace = Pace(0.05)
    pace.note_chunk(0.3)
    assert not pace.decodes_first  # nothing is known of steps
    pace.note_step(0.02)
    pace.note_chunk(0.3)
    steps = 0
    while pace.decodes_first:
        pace.note_step(0.02)
        steps += 1
    assert steps == 10  # 0.3 s and ten steps of 0.02 s: ten tokens in 0.5 s
    for _ in range(100):
        pace.note_step(0.1)
    pace.note_chunk(0.29)
    for _ in range(3):  # a target below the step's own time leaves prompts half of it
        assert pace.decodes_first
        pace.note_step(0.1)
    assert not pace.decodes_first

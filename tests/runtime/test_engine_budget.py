"""The engine under a moving budget, used from several threads, and prefills that it interrupts."""

import random
import threading
import time

import pytest

from rap_env.plan import Plan
from rap_env.runtime import controller
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.request_handle import EXPECTED_TOKENS
from tests.runtime.harness import (
    ORDER,
    PLENTY,
    Harness,
    alone,
    eventually,
    greedy,
    ordered,
    prompt,
    serve_while_the_budget_jumps,
)
from tests.runtime.test_sampling import reading


def test_measured_bytes_stay_within_a_budget_that_jumps():
    harness = Harness(layers=4, hold_s=0.3)
    engine = harness.engine(prefill_chunk_tokens=4, max_batch_size=4)
    top = harness.need(Plan(), BatchShape(4, 40))
    least = harness.need(harness.everything, BatchShape(1, 40))
    serve_while_the_budget_jumps(harness, engine, int(0.8 * least), top)
    assert engine.stats().preemptions > 0
    assert harness.controller.switcher.switches > 10
    for record in harness.records:
        assert record.peak_bytes <= record.budget_bytes
        assert record.held.total <= record.budget_bytes


def test_an_engine_says_why_it_cannot_serve(harness, engine):
    assert engine.unready_reason() == "The engine does not run."
    engine.start()
    try:
        assert engine.unready_reason() is None
        harness.budget_bytes = 10
        reason = engine.unready_reason()  # by the new budget, whether the engine has read it or not
        assert "one token into the budget of 10 B; raise model_memory" in reason
        harness.budget_bytes = PLENTY
        assert engine.unready_reason() is None
        poll = harness.controller.monitor.poll
        harness.controller.monitor.poll = None
        eventually(lambda: "last turn of the engine failed" in (engine.unready_reason() or ""))
        harness.controller.monitor.poll = poll
        eventually(lambda: engine.unready_reason() is None)
    finally:
        engine.close()
    assert engine.unready_reason() == "The engine does not run."


def test_a_queued_request_that_can_no_longer_fit_is_rejected(harness, engine):
    handle = engine.submit(prompt(5), greedy(20))
    harness.budget_bytes = harness.controller.monitor.max_budget_bytes = 1000
    engine.step()
    assert handle.reason == "error"
    assert "do not fit the largest expected budget" in handle.error
    assert handle.rejection == "infeasible"


def test_an_answer_is_admitted_for_a_part_and_ends_where_no_more_fits():
    harness = Harness(positions=600, guard_order=())
    harness.budget_bytes = harness.need(Plan(), BatchShape(1, 300))
    harness.controller.monitor.max_budget_bytes = harness.budget_bytes
    engine = harness.engine(max_batch_size=1)
    long, short = (engine.submit(prompt(5), greedy(tokens)) for tokens in (500, 20))
    for _ in range(3):  # nothing runs in the turns in which an answer is put back and ends
        harness.run(engine)
    assert [handle.reason for handle in (long, short)] == ["length", "length"]
    assert len(long.token_ids) == EXPECTED_TOKENS
    harness.budget_bytes = harness.controller.monitor.max_budget_bytes = PLENTY
    whole = engine.submit(prompt(5), greedy(500))
    harness.run(engine, turns=1000)
    assert whole.token_ids[:EXPECTED_TOKENS] == long.token_ids
    assert len(whole.token_ids) == 500


@pytest.fixture
def served():
    """An engine that runs in its own thread, in real time."""
    harness = Harness(hold_s=0.0, spare_share=0.0, clock=time.monotonic)
    engine = harness.engine(max_batch_size=4, prefill_chunk_tokens=64)
    harness.controller.monitor.max_budget_bytes = PLENTY
    engine.start()
    yield harness, engine
    engine.close(timeout_s=30)


def test_threads_that_submit_cancel_and_move_the_budget_corrupt_nothing(served):
    harness, engine = served
    tight = harness.need(Plan.removing(0, 3, 4), BatchShape(3, 40))
    handles, stop = [], threading.Event()

    def move_the_budget():
        draw = random.Random(1)
        while not stop.wait(0.003):
            harness.budget_bytes = draw.choice([PLENTY, tight, 10])

    def ask():
        draw = random.Random(2)
        for number in range(40):
            ids = prompt(draw.randint(1, 20), number)
            handles.append((ids, engine.submit(ids, greedy(draw.randint(1, 20)))))
            if number % 5 == 0:
                draw.choice(handles)[1].cancel()
            time.sleep(draw.uniform(0, 0.01))

    threads = [threading.Thread(target=work) for work in (move_the_budget, ask)]
    for thread in threads:
        thread.start()
    threads[1].join()
    time.sleep(0.1)
    stop.set()
    threads[0].join()
    harness.budget_bytes = PLENTY
    constant = 0
    for ids, handle in handles:
        assert handle.result(timeout_s=60).reason in ("length", "cancelled")
        if len(set(handle.plans)) == 1:
            constant += 1
            expected = alone(harness.llm, ids, len(handle.token_ids), handle.plans[0])
            assert handle.token_ids == expected
    assert constant > 3
    stats = engine.stats()
    assert stats.served + stats.cancelled == 40
    assert stats.failed == 0


@pytest.fixture
def looks_before_each_layer(monkeypatch):
    monkeypatch.setattr(controller, "_LOOK_S", 0.0)


class Fall:
    """Lowers a harness's budget while a given layer runs, once for each call of `arm`."""

    def __init__(self, harness, layer=1):
        self.harness, self.armed = harness, None
        module = harness.llm.adapter.layers(harness.llm.model)[layer]
        module.register_forward_pre_hook(self._hook)

    def arm(self, budget_bytes):
        self.armed = budget_bytes

    def _hook(self, *_args):
        if self.armed is not None:
            self.harness.budget_bytes, self.armed = self.armed, None


@pytest.mark.usefixtures("looks_before_each_layer")
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_prefill_chunk_ends_when_the_budget_falls_and_is_repeated(chunk):
    harness = ordered()
    engine, fall = harness.engine(prefill_chunk_tokens=6), Fall(harness)
    handle = engine.submit(prompt(11), reading(4))
    if chunk == 2:
        engine.step()
    records = len(harness.records)
    fall.arm(harness.need(Plan.removing(*ORDER[:4]), BatchShape(1, 15)))
    engine.step()
    assert len(harness.records) == records  # the chunk did not end
    assert harness.mask.removed >= set(ORDER[:4])  # lowered in the same turn
    harness.run(engine)
    assert handle.reason == "length"
    assert len(handle.prompt_samples) == 10
    assert handle.token_ids == alone(harness.llm, prompt(11), 4, harness.mask) or chunk == 2
    assert all(record.peak_bytes <= record.budget_bytes for record in harness.records)


@pytest.mark.usefixtures("looks_before_each_layer")
def test_a_chunk_goes_on_if_what_is_kept_makes_the_room():
    harness = ordered()
    engine, fall = harness.engine(prefill_chunk_tokens=16), Fall(harness)
    for number in range(1, 5):
        engine.submit(prompt(40, number), greedy(1))
    harness.run(engine)
    kept_bytes, records = harness.llm.kept_bytes, len(harness.records)
    handle = engine.submit(prompt(11), greedy(4))
    budget = harness.need(Plan(), BatchShape(1, 15))
    assert harness.llm.held_bytes.weights + kept_bytes > budget
    fall.arm(budget)
    engine.step()
    assert len(harness.records) > records  # the chunk ended
    assert harness.records[records].kind == "prefill"
    assert harness.llm.kept_bytes < kept_bytes
    harness.run(engine)
    assert (engine.stats().repeated_tokens, harness.mask) == (0, Plan())
    assert handle.token_ids == alone(harness.llm, prompt(11), 4)


@pytest.mark.usefixtures("looks_before_each_layer")
def test_a_budget_that_falls_and_rises_without_end_cannot_stop_a_prefill():
    harness = ordered(hold_s=0.0)
    engine, fall = harness.engine(), Fall(harness)
    handle = engine.submit(prompt(11), greedy(3))

    def jump(_turn):
        harness.budget_bytes = PLENTY
        if not handle.token_ids:
            fall.arm(harness.need(Plan(), BatchShape(1, 1)) // 2)

    harness.run(engine, before=jump)
    assert handle.reason == "length"

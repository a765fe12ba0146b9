"""Prefill chunks that end between two layers because the budget has fallen."""

import pytest

from rap_env.plan import Plan
from rap_env.runtime import scheduler
from rap_env.runtime.batch_shape import BatchShape
from tests.runtime.harness import ORDER, PLENTY, alone, greedy, ordered, prompt
from tests.runtime.test_prompt_logprobs import reading


@pytest.fixture(autouse=True)
def looks_before_each_layer(monkeypatch):
    monkeypatch.setattr(scheduler, "_LOOK_S", 0.0)


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
    assert engine.stats().interruptions == 1
    assert len(harness.records) == records  # the chunk did not end
    assert harness.mask.removed >= set(ORDER[:4])  # lowered in the same turn
    harness.run(engine)
    assert handle.reason == "length"
    assert len(handle.prompt_samples) == 10
    assert handle.token_ids == alone(harness.llm, prompt(11), 4, harness.mask) or chunk == 2
    assert all(record.peak_bytes <= record.budget_bytes for record in harness.records)


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
    assert engine.stats().interruptions == 3


def test_a_budget_that_falls_but_leaves_enough_interrupts_nothing():
    harness = ordered()
    engine, fall = harness.engine(), Fall(harness)
    handle = engine.submit(prompt(11), greedy(3))
    fall.arm(PLENTY - 1)
    harness.run(engine)
    assert (handle.reason, engine.stats().interruptions) == ("length", 0)

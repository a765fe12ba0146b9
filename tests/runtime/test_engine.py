"""What requests get from the engine, and what their handles hold."""

import functools
import math

import pytest
import torch

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    InvalidRequestError,
    QueueFullError,
)
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.request_handle import PlanEvent, RequestHandle, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from tests.runtime.harness import Harness, alone, greedy, prompt, steps

MASKS = (Plan(), Plan.removing(0, 3), Plan.removing(0, 2, 4, 5))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_sliding", "gemma2"])
def test_a_row_gets_the_tokens_that_it_gets_alone(name, mask):
    harness = Harness(name=name, mask=mask)
    harness.controller.chooser.policy = StaticPolicy(mask)
    engine = harness.engine(max_batch_size=3, prefill_chunk_tokens=4)
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 9, 14, 1, 6))]
    handles = [engine.submit(ids, greedy(7 + n)) for n, ids in enumerate(prompts)]
    harness.run(engine)
    assert max(record.rows for record in harness.records) == 3
    for number, (ids, handle) in enumerate(zip(prompts, handles, strict=True)):
        assert handle.reason == "length"
        assert handle.token_ids == alone(harness.llm, ids, 7 + number, mask)
        assert set(handle.plans) == {mask}


def test_a_long_prompt_does_not_delay_decoding_by_more_than_a_chunk(harness):
    engine = harness.engine(prefill_chunk_tokens=4)
    running = engine.submit(prompt(3), greedy(30))
    engine.step()
    engine.submit(prompt(24, 1), greedy(2))
    for _ in range(6):
        before = len(running.token_ids)
        engine.step()
        assert len(running.token_ids) == before + 1
    kinds = [record.kind for record in harness.records]
    assert kinds == ["prefill", "decode"] * 7


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(harness):
    for seed in range(50):
        ids = prompt(6, seed)
        expected = alone(harness.llm, ids, 12)
        stop = expected[-1]
        if expected.index(stop) >= 2:
            break
    engine = harness.engine()
    handle = engine.submit(ids, greedy(12, stop_token_ids=(stop,)))
    harness.run(engine)
    assert handle.reason == "stop"
    assert handle.token_ids == expected[: expected.index(stop)]
    assert len(handle.plans) == len(handle.token_ids)
    assert engine.stats().served == 1


@pytest.mark.parametrize("turns", [0, 1, 3, 6])
def test_a_request_can_be_cancelled_at_any_stage_and_others_continue(harness, turns):
    engine = harness.engine(prefill_chunk_tokens=2)
    staying = engine.submit(prompt(4), greedy(15))
    leaving = engine.submit(prompt(6, 1), greedy(20))
    steps(engine, turns)
    leaving.cancel()
    harness.run(engine)
    assert leaving.reason == "cancelled"
    assert len(leaving.token_ids) < 20
    assert staying.token_ids == alone(harness.llm, prompt(4), 15)
    assert engine.stats().cancelled == 1
    assert harness.llm.held_bytes.kv_cache == 0


def test_invalid_requests_are_rejected_at_once():
    engine = Harness().engine(max_seq_len_tokens=20)
    for ids, new, words in (
        ([], 1, "prompt is empty"),
        (prompt(15), 6, "15 tokens, and 6 new ones"),
        ([3, 61], 1, "Token 61 is not in"),
        ([-1, 5], 1, "Token -1 is not in"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            engine.submit(ids, greedy(new))
    engine.submit(prompt(15), greedy(5))
    with pytest.raises(InvalidRequestError, match="must be at least 1"):
        Harness().engine(max_seq_len_tokens=65)


def test_a_full_queue_rejects_requests():
    engine = Harness().engine(max_queue=2)
    for _ in range(2):
        engine.submit(prompt(3), greedy(2))
    with pytest.raises(QueueFullError, match="full: 2 requests wait"):
        engine.submit(prompt(3), greedy(2))
    assert engine.stats().refused == 1


def test_no_request_overtakes_the_first_one_in_the_queue(harness):
    engine = harness.engine(max_batch_size=2)
    handles = [engine.submit(prompt(3, n), greedy(6)) for n in range(5)]
    harness.run(engine)
    firsts = [handle.first_token_s for handle in handles]
    assert firsts == sorted(firsts)


def test_a_failing_step_ends_its_requests_and_the_engine_continues(harness, engine, caplog):
    handles = [engine.submit(prompt(3 + n, n), greedy(10)) for n in range(2)]
    steps(engine, 4)
    fails(harness, lambda ids: True, RuntimeError("out of luck"))
    engine.step()
    del harness.llm.model.forward
    assert all("out of luck" in handle.error for handle in handles)
    after = engine.submit(prompt(5), greedy(4))
    harness.run(engine)
    assert after.token_ids == alone(harness.llm, prompt(5), 4)
    assert engine.stats().failed == 2


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")


def fails(harness, when, error=OUT_OF_MEMORY):
    """Let the model's passes fail where `when(input_ids)` holds; the plan stays."""
    harness.controller.monitor.observe_out_of_memory = lambda kind: None
    forward = harness.llm.model.forward

    @functools.wraps(forward)
    def failing(*args, **kwargs):
        output = forward(*args, **kwargs)  # caches are written, as far as memory goes
        if when(kwargs["input_ids"]):
            raise error
        return output

    harness.llm.model.forward = failing


def test_requests_that_run_out_of_memory_together_run_again_in_smaller_batches(harness, caplog):
    engine = harness.engine(max_batch_size=3)
    prompts = [prompt(20 + n, n) for n in range(3)]
    handles = [engine.submit(ids, greedy(4 + n)) for n, ids in enumerate(prompts)]
    fails(harness, lambda ids: len(ids) == 3)
    harness.run(engine)
    assert max(record.rows for record in harness.records) == 2
    del harness.llm.model.forward
    for number, (ids, handle) in enumerate(zip(prompts, handles, strict=True)):
        assert handle.reason == "length"
        assert handle.token_ids == alone(harness.llm, ids, 4 + number)
    assert "Memory ran out with 3 requests" in caplog.text
    assert engine.stats().preemptions >= 3


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("out of memory")])
def test_a_request_whose_prefill_fails_alone_ends_alone(harness, engine, error):
    running = engine.submit(prompt(3), greedy(20))
    steps(engine, 3)
    long = engine.submit(prompt(20, 1), greedy(5))
    fails(harness, lambda ids: ids.shape[1] > 10, error)
    harness.run(engine)
    assert long.reason == "error"
    assert "out of memory" in long.error
    assert running.reason == "length"
    assert running.preemptions == 0
    del harness.llm.model.forward
    assert running.token_ids == alone(harness.llm, prompt(3), 20)


def test_logits_that_are_not_finite_end_the_request(harness, engine):
    handle = engine.submit(prompt(3), greedy(10))
    engine.step()
    with torch.no_grad():
        harness.llm.model.get_output_embeddings().weight.fill_(math.nan)
    harness.run(engine)
    assert handle.reason == "error"
    assert "logits that are not finite" in handle.error


def test_closing_ends_all_requests(harness):
    engine = harness.engine(max_batch_size=1)
    handles = [engine.submit(prompt(3, n), greedy(20)) for n in range(3)]
    steps(engine, 3)
    engine.close()
    for handle in handles:
        assert (handle.reason, handle.error) == ("cancelled", "The engine was closed.")
    assert not engine.step()
    assert harness.llm.held_bytes.kv_cache == 0
    with pytest.raises(EngineClosedError, match="accepts no more requests"):
        engine.submit(prompt(3), greedy(2))
    engine.close()


def test_a_request_that_can_never_fit_is_rejected(harness):
    least = harness.need(harness.everything, BatchShape(1, 30))
    harness.budget_bytes = harness.controller.monitor.max_budget_bytes = least - 1
    engine = harness.engine()
    with pytest.raises(InfeasibleBudgetError, match="under any plan"):
        engine.submit(prompt(21), greedy(10))
    engine.submit(prompt(11), greedy(10))
    assert engine.stats().refused == 1


def handle(listener) -> RequestHandle:
    return RequestHandle((3, 4), SamplingParams(), 1.0, listener=listener)


def test_the_plan_is_an_event_only_where_it_changes():
    heard = []
    made = handle(heard.append)
    plans = [Plan.removing(*blocks) for blocks in ((), (), (3,), ())]
    for number, plan in enumerate(plans):
        made.note_plan(plan, float(number))
    changes = [PlanEvent(plans[0], 0.0), PlanEvent(plans[2], 2.0), PlanEvent(plans[3], 3.0)]
    assert heard == changes
    assert made.plan == plans[-1]


def test_a_listener_that_raises_is_logged_and_not_called_again(caplog):
    calls = []

    def broken(event):
        calls.append(event)
        raise RuntimeError("no")

    made = handle(broken)
    for number in (1, 2):
        made.emit(TokenEvent(number, -0.5, 2.0))
    assert len(calls) == 1
    assert made.token_ids == [1, 2]
    assert "not called again" in caplog.text

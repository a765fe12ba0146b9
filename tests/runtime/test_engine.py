from __future__ import annotations

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
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, PlanEvent, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from tests.runtime.harness import Harness, alone, greedy, prompt

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


def test_later_requests_join_between_steps():
    harness = Harness()
    engine = harness.engine()
    first = engine.submit(prompt(5), greedy(12))
    for _ in range(4):
        engine.step()
    assert len(first.token_ids) > 2
    second = engine.submit(prompt(11, 1), greedy(4))
    harness.run(engine)
    assert second.ended_s <= first.ended_s
    assert first.token_ids == alone(harness.llm, prompt(5), 12)
    assert second.token_ids == alone(harness.llm, prompt(11, 1), 4)


def test_a_long_prompt_does_not_delay_decoding_by_more_than_a_chunk():
    harness = Harness()
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


def test_seeded_sampling_does_not_depend_on_other_rows():
    params = SamplingParams(max_new_tokens=10, temperature=1.3, top_k=20, seed=11)

    def drawn(neighbours):
        harness = Harness()
        engine = harness.engine()
        for number in range(neighbours):
            engine.submit(prompt(4 + number, number), SamplingParams(8, temperature=1.0))
        handle = engine.submit(prompt(6, 99), params)
        harness.run(engine)
        return handle.token_ids

    assert drawn(0) == drawn(3)


def test_log_probabilities_are_those_of_the_model():
    harness = Harness()
    engine = harness.engine()
    ids = prompt(6)
    handle = engine.submit(ids, greedy(5))
    harness.run(engine)
    with torch.no_grad():
        logits = harness.llm.model(input_ids=torch.tensor([ids + handle.token_ids])).logits[0]
    expected = torch.log_softmax(logits.float(), dim=-1)
    for number, (token, logprob) in enumerate(zip(handle.token_ids, handle.logprobs, strict=True)):
        assert logprob == pytest.approx(float(expected[len(ids) - 1 + number, token]), abs=1e-4)


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it():
    harness = Harness()
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


def test_events_come_in_order_with_times():
    harness = Harness()
    engine = harness.engine()
    heard = []
    handle = engine.submit(prompt(3), greedy(4), heard.append)
    harness.run(engine)
    admitted, plan, *tokens, end = heard
    assert admitted == AdmitEvent(0.0)
    assert plan == PlanEvent(Plan(), 0.0)
    assert [event.token_id for event in tokens] == handle.token_ids
    assert all(isinstance(event, TokenEvent) for event in tokens)
    times = [event.time_s for event in tokens]
    assert times == sorted(times)
    assert end == EndEvent("length", None, handle.ended_s)
    assert handle.arrived_s == 0.0
    assert handle.first_token_s == times[0]


def test_a_listener_that_raises_does_not_affect_requests(caplog):
    harness = Harness()
    engine = harness.engine()

    def broken(event):
        raise RuntimeError("no")

    first = engine.submit(prompt(3), greedy(5), broken)
    second = engine.submit(prompt(4, 1), greedy(5))
    harness.run(engine)
    assert (first.reason, second.reason) == ("length", "length")
    assert second.token_ids == alone(harness.llm, prompt(4, 1), 5)


@pytest.mark.parametrize("turns", [0, 1, 3, 6])
def test_a_request_can_be_cancelled_at_any_stage_and_others_continue(turns):
    harness = Harness()
    engine = harness.engine(prefill_chunk_tokens=2)
    staying = engine.submit(prompt(4), greedy(15))
    leaving = engine.submit(prompt(6, 1), greedy(20))
    for _ in range(turns):
        engine.step()
    leaving.cancel()
    harness.run(engine)
    assert leaving.reason == "cancelled"
    assert len(leaving.token_ids) < 20
    assert staying.token_ids == alone(harness.llm, prompt(4), 15)
    assert engine.stats().cancelled == 1
    assert harness.llm.held_bytes.kv_cache == 0


def test_invalid_requests_are_rejected_at_once():
    engine = Harness().engine(max_seq_len_tokens=20)
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        engine.submit([], greedy(1))
    with pytest.raises(InvalidRequestError, match="15 tokens, and 6 new ones"):
        engine.submit(prompt(15), greedy(6))
    with pytest.raises(InvalidRequestError, match="Token 61 is not in"):
        engine.submit([3, 61], greedy(1))
    with pytest.raises(InvalidRequestError, match="Token -1 is not in"):
        engine.submit([-1, 5], greedy(1))
    engine.submit(prompt(15), greedy(5))


@pytest.mark.parametrize(
    "wrong", [{"max_batch_size": 0}, {"prefill_chunk_tokens": 0}, {"max_seq_len_tokens": 65}]
)
def test_invalid_limits_are_rejected(wrong):
    with pytest.raises(InvalidRequestError, match="must be at least 1"):
        Harness().engine(**wrong)


def test_a_request_can_use_the_whole_context():
    harness = Harness()
    engine = harness.engine()
    handles = [engine.submit(prompt(length, length), greedy(64 - length)) for length in (60, 2)]
    harness.run(engine)
    assert [len(handle.token_ids) for handle in handles] == [4, 62]
    assert max(record.length for record in harness.records) <= 64


def test_a_full_queue_rejects_requests():
    engine = Harness().engine(max_queue=2)
    for _ in range(2):
        engine.submit(prompt(3), greedy(2))
    with pytest.raises(QueueFullError, match="full: 2 requests wait"):
        engine.submit(prompt(3), greedy(2))
    assert engine.stats().refused == 1


def test_a_request_that_waits_too_long_is_rejected():
    harness = Harness()
    engine = harness.engine(max_batch_size=1, queue_timeout_s=1.0)
    first = engine.submit(prompt(3), greedy(30))
    second = engine.submit(prompt(3), greedy(2))
    harness.run(engine)
    assert first.reason == "length"
    assert second.reason == "error"
    assert "waited longer than 1.0 s" in second.error
    assert second.rejection == "queue_timeout"
    assert engine.stats().refused == 1


def test_no_request_overtakes_the_first_one_in_the_queue():
    harness = Harness()
    engine = harness.engine(max_batch_size=2)
    handles = [engine.submit(prompt(3, n), greedy(6)) for n in range(5)]
    harness.run(engine)
    firsts = [handle.first_token_s for handle in handles]
    assert firsts == sorted(firsts)


def test_a_failing_step_ends_its_requests_and_the_engine_continues(caplog):
    harness = Harness()
    engine = harness.engine()
    handles = [engine.submit(prompt(3 + n, n), greedy(10)) for n in range(2)]
    for _ in range(4):
        engine.step()
    forward, calls = harness.llm.model.forward, []

    @functools.wraps(forward)
    def broken(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("out of luck")

    harness.llm.model.forward = broken
    engine.step()
    harness.llm.model.forward = forward
    for handle in handles:
        assert handle.reason == "error"
        assert "out of luck" in handle.error
    after = engine.submit(prompt(5), greedy(4))
    harness.run(engine)
    assert after.token_ids == alone(harness.llm, prompt(5), 4)
    assert engine.stats().failed == 2


def runs_out_of_memory(harness, when):
    """Let the model's passes run out of memory where `when(input_ids)` holds; the plan stays."""
    harness.controller.monitor.observe_out_of_memory = lambda kind: None
    forward = harness.llm.model.forward

    @functools.wraps(forward)
    def short(*args, **kwargs):
        found = forward(*args, **kwargs)  # caches are written, as far as memory goes
        if when(kwargs["input_ids"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return found

    harness.llm.model.forward = short


def test_requests_that_run_out_of_memory_together_run_again_in_smaller_batches(caplog):
    harness = Harness()
    engine = harness.engine(max_batch_size=3)
    prompts = [prompt(20 + n, n) for n in range(3)]
    handles = [engine.submit(ids, greedy(4 + n)) for n, ids in enumerate(prompts)]
    runs_out_of_memory(harness, lambda ids: len(ids) == 3)
    harness.run(engine)
    assert max(record.rows for record in harness.records) == 2
    del harness.llm.model.forward
    for number, (ids, handle) in enumerate(zip(prompts, handles, strict=True)):
        assert handle.reason == "length"
        assert handle.token_ids == alone(harness.llm, ids, 4 + number)
    assert "Memory ran out with 3 requests" in caplog.text
    assert engine.stats().preemptions >= 3


def test_a_request_that_runs_out_of_memory_alone_fails_alone():
    harness = Harness()
    engine = harness.engine()
    running = engine.submit(prompt(3), greedy(20))
    for _ in range(3):
        engine.step()
    long = engine.submit(prompt(20, 1), greedy(5))
    runs_out_of_memory(harness, lambda ids: ids.shape[1] > 10)
    harness.run(engine)
    assert long.reason == "error"
    assert "out of memory" in long.error
    assert running.reason == "length"
    assert running.preemptions == 0
    del harness.llm.model.forward
    assert running.token_ids == alone(harness.llm, prompt(3), 20)


def test_what_ran_out_of_memory_is_not_expected_again():
    harness = Harness(budget=1 << 20)
    monitor = harness.controller.monitor
    peak = monitor.meter.peak_bytes()
    harness.controller.note_out_of_memory("decode")
    assert monitor.margin.bytes == (1 << 20) - peak > 0


def test_a_failing_prefill_ends_only_its_request():
    harness = Harness()
    engine = harness.engine()
    running = engine.submit(prompt(3), greedy(10))
    engine.step()
    failing = engine.submit(prompt(20, 1), greedy(5))
    forward = harness.llm.model.forward

    @functools.wraps(forward)
    def broken(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            raise RuntimeError("too long")
        return forward(*args, **kwargs)

    harness.llm.model.forward = broken
    harness.run(engine)
    assert failing.reason == "error"
    assert running.reason == "length"


def test_logits_that_are_not_finite_end_the_request():
    harness = Harness()
    engine = harness.engine()
    handle = engine.submit(prompt(3), greedy(10))
    engine.step()
    with torch.no_grad():
        harness.llm.model.get_output_embeddings().weight.fill_(math.nan)
    harness.run(engine)
    assert handle.reason == "error"
    assert "logits that are not finite" in handle.error


def test_stats_count_everything():
    harness = Harness()
    engine = harness.engine()
    for n in range(3):
        engine.submit(prompt(4, n), greedy(5))
    engine.step()
    early = engine.stats()
    assert (early.queued, early.running, early.tokens) == (2, 1, 2)
    harness.run(engine)
    stats = engine.stats()
    assert (stats.queued, stats.running, stats.served) == (0, 0, 3)
    assert (stats.tokens, stats.prompt_tokens) == (15, 12)
    assert stats.plan == Plan()
    assert stats.held == harness.llm.held_bytes
    assert 0 < stats.overhead_s < stats.busy_s


def test_records_describe_each_step():
    harness = Harness()
    engine = harness.engine()
    engine.submit(prompt(4), greedy(3))
    harness.run(engine)
    assert [(r.kind, r.rows, r.length) for r in harness.records] == [
        ("prefill", 1, 4),
        ("decode", 1, 5),
        ("decode", 1, 6),
    ]
    for record in harness.records:
        assert record.budget_bytes == harness.budget_bytes
        assert record.duration_s > 0
        assert record.peak_bytes >= record.held.weights


def test_closing_ends_all_requests():
    harness = Harness()
    engine = harness.engine(max_batch_size=1)
    handles = [engine.submit(prompt(3, n), greedy(20)) for n in range(3)]
    for _ in range(3):
        engine.step()
    engine.close()
    for handle in handles:
        assert (handle.reason, handle.error) == ("cancelled", "The engine was closed.")
    assert not engine.step()
    assert harness.llm.held_bytes.kv_cache == 0
    with pytest.raises(EngineClosedError, match="accepts no more requests"):
        engine.submit(prompt(3), greedy(2))
    engine.close()


def test_a_request_that_can_never_fit_is_rejected():
    harness = Harness()
    least = harness.need(harness.everything, BatchShape(1, 30))
    harness.budget_bytes = harness.controller.monitor.max_budget_bytes = least - 1
    engine = harness.engine()
    with pytest.raises(InfeasibleBudgetError, match="under any plan"):
        engine.submit(prompt(21), greedy(10))
    engine.submit(prompt(11), greedy(10))
    assert engine.stats().refused == 1


def test_warm_up_teaches_the_margin_and_leaves_no_rows():
    harness = Harness()
    engine = harness.engine(prefill_chunk_tokens=8)
    harness.meter.noise_bytes = 10**6
    engine.warm_up()
    assert harness.controller.monitor.margin.bytes > 9 * 10**5
    assert harness.llm.held_bytes.kv_cache == 0
    assert engine.stats().tokens == 0


def test_the_time_to_retry_after_is_that_of_the_running_request_with_the_fewest_tokens_to_come():
    engine = Harness().engine()
    assert engine.retry_after_s() == 1
    for number, new in enumerate((40, 12)):
        engine.submit(prompt(4, number), greedy(new))
    for _ in range(3):
        engine.step()
    assert engine.retry_after_s() == 1  # steps take milliseconds
    engine._scheduler._decode_s = 0.5
    left = 12 - len(engine._scheduler.running[1].handle.token_ids)
    assert engine.retry_after_s() == -(-left // 2)

"""The OpenAI client against a real engine with a tiny model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.runtime.memory_source import GivenMemory
from tests.serving.conftest import client_of, served
from tests.tiny import tiny_llm

HI = [{"role": "user", "content": "hi"}]


class Budget:
    """A budget that a test moves, and an engine under it."""

    def __init__(self, tokenizer, limit_bytes=10**9, **settings):
        llm = tiny_llm(layers=4, tokenizer=tokenizer)
        llm.set_residency("offload")
        self.bytes = limit_bytes
        memory = GivenMemory(lambda: self.bytes, limit_bytes=limit_bytes)
        self.controller = RuntimeController(
            llm, OrderPolicy(_memory(llm), range(8)), memory, meter=TensorMeter(llm), hold_s=0.0
        )
        self.engine = Engine(llm, self.controller, max_batch_size=4, **settings)
        self.plans = []  # of every step
        self.pause_after = float("inf")  # steps, after which the engine waits for `resumed`
        self.paused, self.resumed = threading.Event(), threading.Event()
        self.engine.observers.append(self._observe)

    def _observe(self, record):
        self.plans.append(record.plan)
        if len(self.plans) >= self.pause_after:
            self.paused.set()
            self.resumed.wait(20)

    def need(self, removed, demand):
        return self.controller.estimator.peak_bytes(Plan.removing(*range(removed)), demand)


def _memory(llm):
    from rap_env.memory import MemoryModel

    return MemoryModel(llm)


@pytest.fixture(scope="module")
def budget(tokenizer):
    return Budget(tokenizer, max_queue=16)


@pytest.fixture(scope="module")
def server(budget, tokenizer):
    with served(budget.engine, tokenizer) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as found:
        yield found


def greedy(client, **more):
    asked = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12, **more}
    return client.chat.completions.create(**asked)


def test_chat(client):
    answer = greedy(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].message.content == greedy(client).choices[0].message.content


def test_a_stream_equals_the_complete_answer(client):
    with greedy(client, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == greedy(client).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_completions_of_text_and_of_ids(client, tokenizer):
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt="ab", **asked)
    by_ids = client.completions.create(prompt=tokenizer.encode("ab"), **asked)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == 2
    streamed = client.completions.create(prompt="ab", stream=True, **asked)
    assert "".join(c.choices[0].text for c in streamed) == by_text.choices[0].text


def test_a_seed_gives_the_same_answer_again(client):
    asked = {"temperature": 1, "seed": 7, "n": 2}
    first, second = ([c.message.content for c in greedy(client, **asked).choices] for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = greedy(client).choices[0].message.content
    stop = whole[4:6]
    answer = greedy(client, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client):
    content = greedy(client, logprobs=True).choices[0].logprobs.content
    assert len(content) == 12
    assert all(entry.logprob <= 0 for entry in content)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError) as found:
        greedy(client, model="other")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as found:
        greedy(client, temperature=5)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        greedy(client, max_tokens=64)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="tiny", prompt=[3, 4, 10**6])
    assert "1000000" in found.value.message


def test_closing_a_stream_cancels_the_request(client, budget):
    cancelled = budget.engine.stats().cancelled
    stream = greedy(client, stream=True, max_tokens=40)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while (stats := budget.engine.stats()).cancelled == cancelled and stats.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert greedy(client).usage.completion_tokens == 12


def test_concurrent_clients_get_the_answers_of_single_clients(client):
    prompts = [f"{letter} is a letter" for letter in "abcdefgh"]
    alone = [_one(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: _one(client, prompt), prompts))
    assert together == alone


def _one(client, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=20)
    return answer.choices[0].text


def test_the_mask_changes_while_a_stream_runs(client, budget):
    before = greedy(client, max_tokens=40).choices[0].message.content
    del budget.plans[:]
    budget.pause_after = 8  # so that the budget falls after the same step at any load
    stream = greedy(client, stream=True, max_tokens=40)
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if number == 5:
            assert budget.paused.wait(20)
            budget.bytes = budget.need(4, BatchShape(1, 60))
            budget.resumed.set()
    budget.pause_after = float("inf")
    assert text != before
    plan = budget.plans[-1]  # of the last step: an idle engine restores blocks
    assert chunk.model_extra["rap"] == {
        "plan": plan.digest, "delta_nll": None,  # this policy predicts none
        "levels": plan.summary, "plan_changed": True,
    }  # fmt: skip
    counts = [len(plan.removed) for plan in budget.plans]
    assert counts[0] == 0
    assert counts[-1] >= 4
    budget.bytes = 10**9
    greedy(client)
    deadline = time.monotonic() + 20
    while budget.engine.stats().plan:  # there is room again
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert greedy(client, max_tokens=40).choices[0].message.content == before


def test_a_request_that_no_mask_fits_waits_then_times_out(tokenizer):
    budget = Budget(tokenizer, queue_timeout_s=0.3)
    with served(budget.engine, tokenizer) as server, client_of(server) as client:
        budget.bytes = 10
        with pytest.raises(openai.InternalServerError) as found:
            greedy(client)
        assert found.value.status_code == 503
        budget.bytes = 10**9
        assert greedy(client).usage.completion_tokens == 12


def test_a_request_that_never_fits_is_rejected_immediately(tokenizer):
    budget = Budget(tokenizer, limit_bytes=10)
    with (
        served(budget.engine, tokenizer) as server,
        client_of(server) as client,
        pytest.raises(openai.InternalServerError, match="tokens") as found,
    ):
        greedy(client)
    assert found.value.status_code == 503
    assert found.value.code == "insufficient_memory"


def test_a_full_queue_is_reported(tokenizer):
    budget = Budget(tokenizer, max_queue=1)
    with served(budget.engine, tokenizer) as server, client_of(server) as client:
        budget.bytes = 10  # no request leaves the queue
        waiting = threading.Thread(target=lambda: greedy(client))
        waiting.start()
        while not budget.engine.stats().queued:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as found:
            greedy(client)
        assert found.value.code == "rate_limit_exceeded"
        budget.bytes = 10**9
        waiting.join(20)
        assert not waiting.is_alive()


def test_shutdown_is_reported_to_waiting_requests(tokenizer):
    budget = Budget(tokenizer)
    with (
        served(budget.engine, tokenizer, shutdown_grace_s=0.3) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        budget.bytes = 10
        waiting = pool.submit(greedy, client)
        while not budget.engine.stats().queued:
            time.sleep(0.01)
        server.stop()
        with pytest.raises(openai.InternalServerError) as found:
            waiting.result(20)
    assert found.value.status_code == 503
    assert found.value.code == "shutting_down"

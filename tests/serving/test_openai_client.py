"""The OpenAI client against a real engine with a tiny model."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from rap_env.policies.loading import OrderPolicy
from tests.runtime.harness import PLENTY, Harness, eventually
from tests.serving.conftest import HI, chat, client_of, served


def live(**settings):
    """A harness whose policy removes blocks in order, and its engine in real time."""
    harness = Harness(layers=4, hold_s=0.0, clock=time.monotonic)
    harness.controller.chooser.policy = OrderPolicy(harness.estimator.memory, range(8))
    harness.controller.monitor.max_budget_bytes = PLENTY
    return harness, harness.engine(max_batch_size=4, **settings)


@pytest.fixture(scope="module")
def engine():
    return live(max_queue=16)


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    with served(engine[1], tokenizer) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as found:
        yield found


def test_the_client_reads_chats_streams_and_models(client):
    whole = chat(client).choices[0]
    with chat(client, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    assert last.usage.completion_tokens == 10
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "length"
    stop = whole.message.content[4:6]
    stopped = chat(client, stop=stop).choices[0]
    assert stopped.message.content == whole.message.content.partition(stop)[0]
    assert stopped.finish_reason == "stop"
    first, second = (chat(client, temperature=1, seed=7, n=2).choices for _ in range(2))
    assert first == second
    assert first[0].message.content != first[1].message.content
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_newer_api_gives_the_answers_of_chats(client):
    asked = {"model": "tiny", "input": HI, "temperature": 0, "max_output_tokens": 10}
    text = chat(client).choices[0].message.content
    whole = client.responses.create(**asked)
    assert (whole.output_text, whole.status) == (text, "incomplete")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (20, 10)
    with client.responses.stream(**asked) as stream:
        *events, last = stream
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert (last.type, last.response.output_text) == ("response.incomplete", "".join(deltas))
    assert last.response.output_text == text
    with pytest.raises(openai.BadRequestError, match="stores no answers"):
        client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, temperature=5, extra_headers={"x-request-id": "mine"})
    assert (raised.value.param, raised.value.request_id) == ("temperature", "mine")
    with pytest.raises(openai.BadRequestError, match="1000000"):
        client.completions.create(model="tiny", prompt=[3, 4, 10**6])


def test_closing_a_stream_cancels_the_request(client, engine):
    stats = engine[1].stats
    cancelled = stats().cancelled
    stream = chat(client, stream=True, max_tokens=40)
    next(iter(stream))
    stream.close()
    eventually(lambda: stats().cancelled > cancelled or not stats().running)
    assert chat(client).usage.completion_tokens == 10


def test_concurrent_clients_get_the_answers_of_single_clients(client):
    def text_of(prompt):
        asked = {"prompt": prompt, "temperature": 0, "max_tokens": 20}
        return client.completions.create(model="tiny", **asked).choices[0].text

    prompts = [f"{letter} is a letter" for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text_of, prompts)) == [text_of(prompt) for prompt in prompts]


def test_shutdown_is_reported_to_waiting_requests(tokenizer):
    harness, engine = live()
    with (
        served(engine, tokenizer, shutdown_grace_s=0.3) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        harness.budget_bytes = 10
        waiting = pool.submit(chat, client)
        eventually(lambda: engine.stats().queued)
        server.stop()
        with pytest.raises(openai.InternalServerError) as found:
            waiting.result(20)
    assert found.value.status_code == 503
    assert found.value.code == "shutting_down"

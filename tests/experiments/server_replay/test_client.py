"""The open-loop client, against our own server with an engine of scripted answers."""

import pytest

from experiments.replay.workload import ReplayRequest
from experiments.server_replay.client import MODEL_NAME, Client
from rap_env.errors import QueueFullError
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def played(engine, tokenizer, requests, timeout_s=10.0):
    with served(engine, tokenizer, model_name=MODEL_NAME) as server:
        return Client(server.url, timeout_s, banned_ids=(2,)).play(requests)


def test_requests_are_sent_at_their_times_and_streams_are_read(tokenizer):
    requests = [ReplayRequest(n, 0.1 * n, (5, 6, 7), 3) for n in range(3)]
    answers = played(FakeEngine(tokenizer, "Pau", pace_s=0.02), tokenizer, requests)
    assert [answer.request.number for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert (answer.outcome, answer.reason, answer.text) == ("served", "", "Pau")
        assert answer.tokens == 3
        assert 0 < answer.first_s <= answer.last_s < 10


def test_a_full_queue_is_a_refusal(tokenizer):
    engine = FakeEngine(tokenizer, end=QueueFullError("The queue is full."))
    (answer,) = played(engine, tokenizer, [ReplayRequest(0, 0.0, (5,), 3)])
    assert (answer.outcome, answer.reason) == ("refused", "429")
    assert answer.first_s is answer.tpot_s is None


def test_the_clients_timeout_counts_from_the_arrival(tokenizer):
    engine = FakeEngine(tokenizer, "Paul", pace_s=0.5)
    (answer,) = played(engine, tokenizer, [ReplayRequest(0, 0.0, (5,), 3)], timeout_s=0.3)
    assert (answer.outcome, answer.text) == ("timed_out", "")


def test_a_server_that_is_gone_is_a_failure():
    (answer,) = Client("http://127.0.0.1:9", 5.0).play([ReplayRequest(0, 0.0, (5,), 3)])
    assert (answer.outcome, answer.reason) == ("failed", "ConnectError")

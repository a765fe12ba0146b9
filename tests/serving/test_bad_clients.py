"""Bad clients get an error or lose their connection without affecting others."""

import contextlib
import json
import socket
import threading

import httpx
import pytest

from rap_env.errors import QueueFullError
from tests.runtime.harness import eventually
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine

BODY = {"model": "tiny", "prompt": "hi"}
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    "content-length: {length}\r\n\r\n"
)


def raw(server, data=b""):
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def request(body, **more):
    content = json.dumps({**body, **more}).encode()
    return HEAD.format(length=len(content)).encode() + content


def everything(connection):
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def outcome(server, name):
    samples = server.service.metrics.requests.collect()[0].samples
    return sum(
        s.value for s in samples if s.name == "rap_requests_total" and s.labels["outcome"] == name
    )


def answers(server):
    response = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=20)
    return response.status_code == 200 and response.json()["choices"][0]["text"] != ""


def test_a_slow_body_times_out_without_delaying_others(tokenizer, monkeypatch):
    monkeypatch.setattr("rap_env.serving.http.BODY_TIMEOUT_S", 0.3)
    with served(FakeEngine(tokenizer), tokenizer) as server:
        slow = raw(server, HEAD.format(length=1000).encode() + b'{"model":')
        assert answers(server)
        received = everything(slow)
        assert received.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in received


def test_bodies_that_are_never_complete_keep_none_out(tokenizer, monkeypatch):
    monkeypatch.setattr("rap_env.serving.http.MOST_BODIES_BYTES", 100_000)
    with served(FakeEngine(tokenizer), tokenizer, max_open_requests=2) as server:
        head = HEAD.format(length=50_000).encode() + b'{"model":'
        slow = [raw(server, head + b" " * 30_000) for _ in range(10)]
        assert all(answers(server) for _ in range(3))
        assert slow[0].recv(65536).startswith(b"HTTP/1.1 503")  # the oldest
        for connection in slow:
            connection.close()
        eventually(lambda: not server.service.bodies._bytes)


def test_a_missing_header_closes_the_connection(tokenizer, monkeypatch):
    monkeypatch.setattr("rap_env.serving.http.HEADER_TIMEOUT_S", 0.3)
    with served(FakeEngine(tokenizer), tokenizer) as server:
        for begun in (b"", b"POST /v1/completions HTTP/1.1\r\nhost: te"):
            assert everything(raw(server, begun)) == b""
        again = raw(server, request(BODY))
        assert again.recv(10) == b"HTTP/1.1 2"
        again.sendall(b"GET /heal")  # a second request that is never finished
        assert b"hello" in everything(again)
        assert answers(server)


def test_a_long_answer_is_no_idle_connection(tokenizer, monkeypatch):
    monkeypatch.setattr("rap_env.serving.http.HEADER_TIMEOUT_S", 0.2)
    engine = FakeEngine(tokenizer, "abcdef", pace_s=0.1)
    with served(engine, tokenizer) as server:
        assert answers(server)


def test_requests_above_the_limit_are_rejected_but_probes_are_answered(tokenizer):
    engine = FakeEngine(tokenizer, "abc", gate=threading.Event())
    with served(engine, tokenizer, max_open_requests=2) as server:
        idle = [raw(server) for _ in range(20)]  # they are no requests
        waiting = [raw(server, request(BODY)) for _ in range(2)]
        eventually(lambda: len(engine.handles) == 2)
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        response = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "too_many_open"
        metric = server.service.metrics.refused_requests
        assert metric.collect()[0].samples[0].value == 1
        engine.gate.set()
        for connection in waiting:
            assert b"HTTP/1.1 200" in connection.recv(65536)
        for connection in (*idle, *waiting):
            connection.close()
        assert answers(server)


def test_invalid_http_is_rejected(tokenizer):
    with served(FakeEngine(tokenizer), tokenizer) as server:
        received = everything(raw(server, b"\x16\x03\x01\x02\x00hello\r\n\r\n"))
        assert received.startswith(b"HTTP/1.1 400")
        assert answers(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_disconnect_cancels_the_handle(tokenizer, stream, begun):
    text = "abc" if begun else "a"  # the gate is before the last token
    engine = FakeEngine(tokenizer, text, gate=threading.Event())
    with served(engine, tokenizer) as server:
        connection = raw(server, request(BODY, stream=stream, max_tokens=50))
        received = b""
        while stream and begun and b'"text": "a"' not in received:  # the first of three pieces
            received += connection.recv(4096)
        assert received.startswith(b"HTTP/1.1 200" if received else b"")
        eventually(lambda: engine.handles)
        assert not engine.handles[0].cancelled
        connection.close()
        eventually(lambda: engine.handles[0].done)
        assert engine.handles[0].reason == "cancelled"
        eventually(lambda: outcome(server, "disconnected") == 1)
        engine.gate.set()
        assert answers(server)


def test_a_disconnect_in_a_body_leaves_nothing_behind(tokenizer):
    engine = FakeEngine(tokenizer)
    with served(engine, tokenizer) as server:
        raw(server, HEAD.format(length=1000).encode() + b'{"model":').close()
        eventually(lambda: outcome(server, "disconnected") == 1)
        assert not engine.handles
        assert answers(server)


def test_an_answer_that_is_not_read_is_cut_off(tokenizer, monkeypatch):
    monkeypatch.setattr("rap_env.serving.http.WRITE_TIMEOUT_S", 0.5)
    engine = FakeEngine(tokenizer, "a" * 60)
    engine.max_seq_len_tokens = 10**6
    engine.tokens = engine.tokens * 1000
    with served(engine, tokenizer, max_new_tokens=10**6) as server:
        connection = raw(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(BODY, stream=True, max_tokens=10**5))
        eventually(lambda: outcome(server, "disconnected") == 1)
        eventually(lambda: not server._server.server_state.connections)
        assert engine.handles[0].cancelled or engine.handles[0].done


def test_all_choices_are_cancelled_when_one_is_rejected(tokenizer):
    engine = FakeEngine(tokenizer, "abc", gate=threading.Event())
    submit = engine.submit

    def once(*args, **more):
        if engine.handles:
            raise QueueFullError("The queue is full.")
        return submit(*args, **more)

    engine.submit = once
    with served(engine, tokenizer) as server:
        response = httpx.post(f"{server.url}/v1/completions", json={**BODY, "n": 2})
        assert response.status_code == 429
        eventually(lambda: engine.handles[0].reason == "cancelled")

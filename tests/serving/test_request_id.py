"""Ids of requests, in responses and in the log."""

from __future__ import annotations

import logging

import httpx
import openai
import pytest

from rap_env.errors import InfeasibleBudgetError
from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import PLAN, FakeEngine

PLAIN = {"model": "tiny", "prompt": "a"}


@pytest.fixture(scope="module")
def server(tokenizer):
    with served(FakeEngine(tokenizer), tokenizer) as found:
        yield found


def ask(server, request_id=None, path="/v1/completions", **more):
    headers = {} if request_id is None else {"x-request-id": request_id}
    return httpx.post(f"{server.url}{path}", json={**PLAIN, **more}, headers=headers)


def lines_of(caplog):
    """Lines of requests that have ended; call it after the server, since they follow responses."""
    return [r.message for r in caplog.records if r.name == "rap_env.serving.request_id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["my-id.7:a/b=", "x" * 128])
def test_the_id_of_the_client_is_kept(server, given, stream):
    response = ask(server, given, stream=stream)
    assert response.status_code == 200
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", 'a"b', "a\u00e9", "{$x}"])
def test_a_request_without_a_valid_id_gets_a_new_one(server, given):
    headers = [] if given is None else [(b"x-request-id", given.encode("latin-1"))]
    found = [
        httpx.get(f"{server.url}/livez", headers=headers).headers["x-request-id"] for _ in range(2)
    ]
    assert all(one.startswith("req_") and len(one) == 36 for one in found)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("raised", "status"), [(InfeasibleBudgetError("No."), 503), (RuntimeError("broken"), 500)]
)
def test_errors_have_the_id_too(tokenizer, raised, status, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    with served(FakeEngine(tokenizer, end=raised), tokenizer) as server:
        with client_of(server) as client, pytest.raises(openai.InternalServerError) as found:
            client.completions.create(**PLAIN, extra_headers={"x-request-id": "mine"})
        assert (found.value.status_code, found.value.request_id) == (status, "mine")
        assert ask(server, "yours", path="/nowhere").headers["x-request-id"] == "yours"
    assert any(line.startswith(f"mine POST /v1/completions {status} ") for line in lines_of(caplog))


def test_a_request_that_ends_is_one_line_of_the_log(tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    with served(FakeEngine(tokenizer, "abc", pace_s=0.03, plans=[PLAN]), tokenizer) as server:
        ask(server, "streamed", stream=True)
        ask(server, "line", path="/a%0Ab?secret=1")
        httpx.get(f"{server.url}/readyz")
        httpx.get(f"{server.url}/metrics")
    first, second = lines_of(caplog)
    assert first.startswith("streamed POST /v1/completions 200 ")
    assert float(first.split()[4]) >= 0.09
    assert " outcome=ok " in first
    assert " prompt_tokens=1 answer_tokens=3 plan=" in first
    assert ' levels="removed attn 0-1; removed ffn 1; ' in first
    assert second.startswith("line POST /a%0Ab 404 ")


def test_an_unauthorized_request_has_an_id(tokenizer, tmp_path):
    (tmp_path / "keys").write_text("key")
    settings = {"api_key_file": str(tmp_path / "keys")}
    with served(FakeEngine(tokenizer), tokenizer, **settings) as server:
        response = ask(server, "mine")
    assert (response.status_code, response.headers["x-request-id"]) == (401, "mine")

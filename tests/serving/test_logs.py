"""Log lines on standard error, and the ids of requests."""

import logging
import re

import httpx
import pytest

from rap_env.errors import InfeasibleBudgetError
from rap_env.serving.settings import ServerSettings
from rap_env.serving.startup import server_logging
from tests.serving.conftest import served
from tests.serving.fake_engine import PLAN, FakeEngine

log = logging.getLogger("rap_env.tests")
PLAIN = {"model": "tiny", "prompt": "a"}


def test_a_line_of_text_has_time_level_and_message(capsys):
    with server_logging(ServerSettings()):
        log.info("Listening at %s", "here")
        log.debug("hidden")
        logging.getLogger("another.library").info("hidden")
        logging.getLogger("another.library").warning("shown")
    lines = capsys.readouterr().err.splitlines()
    time, level, words = lines[0].split(" ", 2)
    assert time.endswith("Z")
    assert (len(time), level, words) == (24, "INFO", "Listening at here")
    assert len(lines) == 2


def ask(server, request_id=None, path="/v1/completions", **more):
    headers = {} if request_id is None else {"x-request-id": request_id}
    return httpx.post(f"{server.url}{path}", json={**PLAIN, **more}, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_a_request_says_its_times_tokens_and_plan(tokenizer, caplog, stream):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    engine = FakeEngine(tokenizer, "abc", pace_s=0.03, plans=(PLAN,))
    with served(engine, tokenizer) as server:
        ask(server, "mine", prompt="xy", stream=stream)
        ask(server, "mine", n=0, stream=stream)
        ask(server, "line", path="/a%0Ab?secret=1")
        httpx.get(f"{server.url}/readyz")
        httpx.get(f"{server.url}/metrics")
    lines = [r.message for r in caplog.records if r.name == "rap_env.serving.http"]
    answered, rejected, unknown = lines
    assert unknown.startswith("line POST /a%0Ab 404 ")
    assert answered.startswith("mine POST /v1/completions 200 ")
    assert rejected.startswith("mine POST /v1/completions 400 ")
    seconds = float(answered.split()[4])
    values = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', answered))
    assert values["outcome"] == "ok"
    assert 0 <= float(values["queue_s"]) <= float(values["first_token_s"]) <= seconds + 0.001
    assert seconds >= 0.09
    assert (values["prompt_tokens"], values["answer_tokens"]) == ("2", "3")
    assert (values["plan"], values["plan_changed"]) == (PLAN.digest, "False")
    assert "outcome=invalid_value" in rejected
    assert "plan=" not in rejected


@pytest.mark.parametrize("given", ["my-id.7:a/b=", "x" * 128])
def test_the_id_of_the_client_is_kept(server, given):
    for more in ({}, {"stream": True}, {"path": "/nowhere"}):
        assert ask(server, given, **more).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", 'a"b', "a\u00e9", "{$x}"])
def test_a_request_without_a_valid_id_gets_a_new_one(server, given):
    headers = [] if given is None else [(b"x-request-id", given.encode("latin-1"))]
    url = f"{server.url}/livez"
    ids = {httpx.get(url, headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(new.startswith("req_") and len(new) == 36 for new in ids)


def test_the_line_of_a_503_has_its_reason(tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    engine = FakeEngine(tokenizer, end=InfeasibleBudgetError("40 tokens do not fit 3 bytes."))
    with served(engine, tokenizer) as server:
        response = ask(server)
    assert response.status_code == 503
    assert "retry-after" not in response.headers
    assert response.headers["x-should-retry"] == "false"
    (line,) = [r for r in caplog.records if r.name == "rap_env.serving.http"]
    assert 'reason="40 tokens do not fit 3 bytes."' in line.message

"""Log lines as text or JSON, on standard error, and the ids of requests."""

import json
import logging

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


def test_a_line_of_json_is_an_object_even_with_a_traceback(capsys):
    with server_logging(ServerSettings(log_format="json", log_level="debug")):
        try:
            raise ValueError("broken")
        except ValueError:
            log.debug("two\nlines", exc_info=True, extra={"fields": {"status": 200}})
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["logger"]) == ("debug", "rap_env.tests")
    assert (line["message"], line["status"]) == ("two\nlines", 200)
    assert line["exception"].endswith("ValueError: broken")


def ask(server, request_id=None, path="/v1/completions", **more):
    headers = {} if request_id is None else {"x-request-id": request_id}
    return httpx.post(f"{server.url}{path}", json={**PLAIN, **more}, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_a_request_says_its_times_tokens_and_plan(tokenizer, capsys, caplog, stream):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    engine = FakeEngine(tokenizer, "abc", pace_s=0.03, plans=(PLAN,))
    with (
        server_logging(ServerSettings(log_format="json")),
        served(engine, tokenizer) as server,
    ):
        ask(server, "mine", prompt="xy", stream=stream)
        ask(server, "mine", n=0, stream=stream)
        ask(server, "line", path="/a%0Ab?secret=1")
        httpx.get(f"{server.url}/readyz")
        httpx.get(f"{server.url}/metrics")
    *_, last = [r.message for r in caplog.records if r.name == "rap_env.serving.http"]
    assert last.startswith("line POST /a%0Ab 404 ")
    answered, rejected, _ = map(json.loads, capsys.readouterr().err.splitlines())
    for line in (answered, rejected):
        assert (line["request_id"], line["path"]) == ("mine", "/v1/completions")
    assert (answered["status"], answered["outcome"]) == (200, "ok")
    assert {line["message"] for line in (answered, rejected)} == {"request ended"}
    assert 0 <= answered["queue_s"] <= answered["first_token_s"] <= answered["seconds"] + 0.001
    assert answered["seconds"] >= 0.09
    assert (answered["prompt_tokens"], answered["answer_tokens"]) == (2, 3)
    assert (answered["plan"], answered["plan_changed"]) == (PLAN.digest, False)
    assert (rejected["status"], rejected["outcome"]) == (400, "invalid_value")
    assert "plan" not in rejected


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
    assert line.fields["reason"] == "40 tokens do not fit 3 bytes."
    assert 'reason="40 tokens do not fit 3 bytes."' in line.message

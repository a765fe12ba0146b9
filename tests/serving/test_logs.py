"""Log lines as text or JSON, to standard error or a rotated file, and the ids of requests."""

from __future__ import annotations

import json
import logging

import httpx
import openai
import pytest

from rap_env.errors import InfeasibleBudgetError, RapError, ServingSettingsError
from rap_env.serving.logs import server_logging
from rap_env.serving.settings import ServerSettings
from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import PLAN, FakeEngine

log = logging.getLogger("rap_env.tests")


def settings(path=None, **values):
    return ServerSettings(log_file=path and str(path), **values)


def test_a_line_of_text_has_time_level_and_message(tmp_path):
    path = tmp_path / "log"
    with server_logging(settings(path)):
        log.info("Listening at %s", "here")
        log.debug("hidden")
        logging.getLogger("another.library").info("hidden")
        logging.getLogger("another.library").warning("shown")
    time, level, words = path.read_text().splitlines()[0].split(" ", 2)
    assert time.endswith("Z")
    assert (len(time), level, words) == (24, "INFO", "Listening at here")
    assert path.read_text().count("\n") == 2


def test_a_line_of_json_is_an_object_even_with_a_traceback(tmp_path):
    path = tmp_path / "log"
    with server_logging(settings(path, log_format="json", log_level="debug")):
        log.debug("two\nlines", extra={"fields": {"status": 200}})
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("It failed.")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["level"], first["logger"]) == ("debug", "rap_env.tests")
    assert (first["message"], first["status"]) == ("two\nlines", 200)
    assert second["exception"].endswith("ValueError: broken")


def test_the_console_is_as_before_afterwards():
    root, package = logging.getLogger(), logging.getLogger("rap_env")
    console = logging.StreamHandler()
    root.addHandler(console)
    before, level = root.handlers[:], package.level
    try:
        with server_logging(settings(log_level="error")):
            assert console not in root.handlers
            assert len(root.handlers) == len(before)  # those that are no console have stayed
        assert (root.handlers, package.level) == (before, level)
    finally:
        root.removeHandler(console)


def test_a_full_file_is_rotated_and_the_oldest_removed(tmp_path):
    path = tmp_path / "log"
    with server_logging(settings(path, log_file_bytes=100, log_file_count=2)):
        for number in range(9):
            log.info("%d%s", number, 40 * ".")
    names = {found.name: found.read_text() for found in tmp_path.iterdir()}
    assert sorted(names) == ["log", "log.1", "log.2"]
    assert [names[n].split()[2][0] for n in ("log.2", "log.1", "log")] == ["6", "7", "8"]


def test_a_failing_disk_is_one_line_on_standard_error(tmp_path, capsys):
    with server_logging(settings(tmp_path / "log")):
        (handler,) = (h for h in logging.getLogger().handlers if hasattr(h, "lost"))
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: PTH123, SIM115
        log.info("one")
        log.info("two")
        handler.stream = None
        log.info("three")
    assert handler.lost == 2
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert "three" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"log_format": "xml"}, "log_format"),
        ({"log_level": "INFO"}, "log_level"),
        ({"log_file_bytes": "big"}, "log_file_bytes must be a number of bytes .* not 'big'"),
        ({"log_file_count": 0}, "log_file_count must be at least 1, not 0"),
    ],
)
def test_invalid_settings_are_named(values, words):
    with pytest.raises(RapError, match=words):
        ServerSettings(**values)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "absent" / "log"
    with (
        pytest.raises(ServingSettingsError, match=f"log_file {path}: No such"),
        server_logging(settings(path)),
    ):
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_a_request_says_its_times_tokens_and_plan(tokenizer, tmp_path, stream):
    path = tmp_path / "log"
    engine = FakeEngine(tokenizer, "abc", plans=(PLAN,))
    body, headers = {"model": "tiny", "prompt": "xy", "stream": stream}, {"x-request-id": "mine"}
    with (
        server_logging(settings(path, log_format="json")),
        served(engine, tokenizer) as server,
    ):
        url = f"{server.url}/v1/completions"
        httpx.post(url, json=body, headers=headers)
        httpx.post(url, json={**body, "n": 0}, headers=headers)
    answered, rejected = map(json.loads, path.read_text().splitlines())
    assert answered["logger"] == "rap_env.serving.logs"
    for line in (answered, rejected):
        assert (line["request_id"], line["method"], line["path"]) == (
            "mine", "POST", "/v1/completions",
        )  # fmt: skip
    assert (answered["status"], answered["outcome"]) == (200, "ok")
    assert 0 <= answered["queue_s"] <= answered["first_token_s"] <= answered["seconds"] + 0.001
    assert (answered["prompt_tokens"], answered["answer_tokens"]) == (2, 3)
    assert (answered["plan"], answered["plan_changed"]) == (PLAN.digest, False)
    assert (rejected["status"], rejected["outcome"]) == (400, "invalid_value")
    assert "plan" not in rejected


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
    return [r.message for r in caplog.records if r.name == "rap_env.serving.logs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["my-id.7:a/b=", "x" * 128])
def test_the_id_of_the_client_is_kept(server, given, stream):
    response = ask(server, given, stream=stream)
    assert response.status_code == 200
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", 'a"b', "a\u00e9", "{$x}"])
def test_a_request_without_a_valid_id_gets_a_new_one(server, given):
    headers = [] if given is None else [(b"x-request-id", given.encode("latin-1"))]
    url = f"{server.url}/livez"
    ids = {httpx.get(url, headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(new.startswith("req_") and len(new) == 36 for new in ids)


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

"""The API by its wire format: answers, streams, errors, health and metrics."""

import gzip
import json

import httpx
import pytest

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    InvalidRequestError,
    QualityFloorError,
    QueueFullError,
)
from rap_env.version import __version__
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import byte_tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "tiny", "prompt": "hi"}


def post(server, body, route="chat/completions", **kwargs):
    if not isinstance(body, bytes | str):
        body = json.dumps(body)
    headers = {"content-type": "application/json", **kwargs.pop("headers", {})}
    url = f"{server.url}/v1/{route}"
    return httpx.post(url, content=body, headers=headers, timeout=30, **kwargs)


def error_of(response, status):
    assert response.status_code == status
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code", "request_id"}
    assert body["error"]["request_id"] == response.headers.get("x-request-id")
    return body["error"]


def events_of(response):
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_answer_has_all_fields_of_the_api(server):
    body = post(server, {**CHAT, "max_tokens": 20, "logprobs": True}).json()
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    entries = choice.pop("logprobs")["content"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello world", "refusal": None},
        "finish_reason": "stop",
    }
    assert "".join(entry["token"] for entry in entries) == "hello world"
    assert entries[0] == {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []}
    prompt = len("user: hi\nassistant: ")
    assert body["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 11, "total_tokens": prompt + 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    (choice,) = post(server, {**CHAT, "max_completion_tokens": 5}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"] is None


def test_a_plain_answer_has_16_tokens_unless_asked_for_more(server):
    body = post(server, PLAIN, "completions").json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}
    ]
    assert server.service.engine.handles[-1].params.max_new_tokens == 16
    asked = {**PLAIN, "prompt": ["ab", [4, 5, 6]], "n": 2, "seed": 5}
    body = post(server, asked, "completions").json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 44)
    handles = server.service.engine.handles[-4:]
    assert [len(handle.prompt_ids) for handle in handles] == [2, 2, 3, 3]
    assert len({handle.params.seed for handle in handles}) == 4


def test_stop_strings_end_the_answer_and_cancel_its_handle(server):
    body = post(server, {**CHAT, "stop": ["o w", "rld"]}).json()
    assert body["choices"][0]["message"]["content"] == "hell"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert server.service.engine.handles[-1].cancelled


def test_sampling_is_passed_on_as_the_api_means_it(server):
    post(server, {**CHAT, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3})
    params = server.service.engine.handles[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 7, 3)
    assert params.stop_token_ids == (2, 7)
    post(server, CHAT)
    params = server.service.engine.handles[-1].params
    assert (params.temperature, params.top_k, params.top_p) == (0.2, 0, 0.9)  # its publisher's
    asked = {"min_p": 0.1, "repeat_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [9]}
    post(server, {**CHAT, **asked, "top_k": -1, "n_predict": -1})
    params = server.service.engine.handles[-1].params
    assert (params.min_p, params.repetition_penalty, params.top_k) == (0.1, 1.2, 0)
    assert params.min_tokens == params.max_new_tokens == 64 - len("user: hi\nassistant: ")
    assert params.stop_token_ids == (2, 7, 9)
    post(server, {**CHAT, "top_p": 0})
    assert server.service.engine.handles[-1].params.greedy


def test_a_chat_stream_has_the_role_then_text_then_finish_reason_of_each_answer(server):
    asked = {**CHAT, "n": 2, "logprobs": True, "stream": True}
    response = post(server, {**asked, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, usage = events_of(response)
    for index in (0, 1):
        choices = [choice for event in events for choice in event["choices"]]
        first, *middle, end = [choice for choice in choices if choice["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
        entries = [entry for choice in middle for entry in choice["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == list("hello world")
        assert end == {"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 22
    assert {event["object"] for event in (*events, usage)} == {"chat.completion.chunk"}
    assert len({event["id"] for event in (*events, usage)}) == 1
    assert all(event["usage"] is None for event in events)


def test_a_plain_stream_has_text_in_every_event(server):
    events = events_of(post(server, {**PLAIN, "stream": True}, "completions"))
    assert "".join(event["choices"][0]["text"] for event in events) == "hello world"
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "stop"
    assert not any("usage" in event for event in events)
    tokenizer = byte_tokenizer()  # characters of several tokens arrive whole
    with served(FakeEngine(tokenizer, "né 你👍"), tokenizer) as other:
        events = events_of(post(other, {**PLAIN, "stream": True}, "completions"))
        assert [e["choices"][0]["text"] for e in events] == ["n", "é", " ", "你", "👍", ""]
        error_of(post(other, {"model": "tiny"}, "completions"), 400)  # no start token


@pytest.mark.parametrize(
    ("change", "param", "code", "words"),
    [
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({"chat_template_kwargs": {"chat_template": "x", "thinks": True}}, "chat_template_kwargs",
         "invalid_value", "not chat_template."),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value",
         "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content", "invalid_type", "text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
         "messages", "invalid_value", "system comes first"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"max_tokens": True}, "max_tokens", "invalid_type", "True"),
        ({"n": 10**30}, "n", "invalid_value", "at most 8"),
        ({"stop": "x" * 257}, "stop[0]", "invalid_value", "256"),
        ({"seed": 2**70}, "seed", "invalid_value", "seed"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
         "unsupported_parameter", "writes no tool calls"),
        ('{"model": "tiny"}', "messages", "missing_required_parameter", "messages"),
        # Of plain completions.
        ({"prompt": []}, "prompt", "invalid_type", "list"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type", "token ids"),
        ({"prompt": "a" * 64}, "prompt", "context_length_exceeded", "maximum context length"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(server, change, param, code, words):
    body, route = (PLAIN, "completions") if param == "prompt" else (CHAT, "chat/completions")
    body = change if isinstance(change, str) else {**body, **change}
    error = error_of(post(server, body, route), 400)
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]
    assert len(error["message"]) < 400


def test_other_fields_are_ignored_and_named_unless_the_server_is_strict(tokenizer, caplog):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "n": None,
        "presence_penalty": 0, "frequency_penalty": 0.0, "top_logprobs": None, "stop": None,
        "modalities": ["text"], "parallel_tool_calls": True, "logprobs": False, "top_k": -1,
    }  # fmt: skip
    others = {"mirostat": 2, "best_of": 3, "mirostat_tau": 0, "suffix": None}
    engine = FakeEngine(tokenizer)
    with served(engine, tokenizer) as server:
        for model in ({"model": "gpt-4"}, {"model": None}):
            body = post(server, {**CHAT, **harmless, **others, **model}).json()
            assert body["rap"]["ignored"] == ["modalities", "mirostat", "best_of"]
        assert caplog.text.count("no effect here: mirostat") == 1
        assert httpx.get(f"{server.url}/v1/models/other").json()["id"] == "tiny"
    del harmless["modalities"]
    with served(engine, tokenizer, strict=True) as server:
        assert post(server, {**CHAT, **harmless}).json()["rap"]["ignored"] == []
        error = error_of(post(server, {**CHAT, "temprature": 1}), 400)
        assert (error["param"], error["code"]) == ("temprature", "unsupported_parameter")
        for body, route in ((CHAT, "chat/completions"), (PLAIN, "completions")):
            error = error_of(post(server, {**body, "model": "gpt-4"}, route), 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
        error_of(httpx.get(f"{server.url}/v1/models/org/other"), 404)


def test_parts_and_developer_messages_are_text(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    post(server, {**CHAT, "messages": messages})
    ids = server.service.engine.handles[-1].prompt_ids
    assert server.service.tokenizer.decode(ids) == "system: be\nuser: ab\nassistant: "


@pytest.mark.parametrize(
    "body",
    ["", "[1]", "[" * 10000, '{"model": NaN}', b"\xff\xfe\x00", "1" * 9999,
     '{"model": "\\ud800", "messages": []}'],
    ids=["empty", "list", "deep", "nan", "binary", "long", "half"],
)  # fmt: skip
def test_a_body_that_is_not_a_json_object_is_rejected(server, body):
    assert error_of(post(server, body), 400)["code"] == "invalid_json"


def test_a_body_needs_no_content_type_and_may_be_packed(server):
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert post(server, CHAT, headers=form).status_code == 200
    packed, gzipped = gzip.compress(json.dumps(CHAT).encode()), {"content-encoding": "gzip"}
    assert post(server, packed, headers=gzipped).status_code == 200
    assert error_of(post(server, CHAT, headers=gzipped), 400)["code"] == "invalid_gzip"
    bomb = gzip.compress(b"[" + b" " * 10**6)
    assert error_of(post(server, bomb, headers=gzipped), 413)["code"] == "request_too_large"
    error = error_of(post(server, packed, headers={"content-encoding": "br"}), 415)
    assert error["code"] == "unsupported_content_encoding"


def test_what_clients_ask_for_beside_answers(server):
    def get(path):
        return httpx.get(f"{server.url}{path}").json()

    assert "/v1/responses" in get("/")["routes"]
    assert get("/version") == {"version": __version__}
    props = get("/props")
    assert props["default_generation_settings"]["n_ctx"] == 64
    assert props["default_generation_settings"]["params"]["temperature"] == 0.2
    ids = httpx.post(f"{server.url}/tokenize", json={"content": "hi"}).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()["content"]
    assert (len(ids), text) == (2, "hi")
    error_of(httpx.post(f"{server.url}/detokenize", json={"tokens": [10**6]}), 400)
    assert {"/v1/responses", "/tokenize"} <= get("/openapi.json")["paths"].keys()
    assert "swagger" in httpx.get(f"{server.url}/docs").text


def test_a_preflight_is_answered_before_keys_are_asked_for(tokenizer, tmp_path):
    (tmp_path / "keys").write_text("key")
    for own, other in (("https://a.example", "http://localhost:80"), ("localhost", "http://a.b")):
        origin = "http://localhost:3000" if own == "localhost" else own
        settings = {"cors_origin": own, "api_key_file": str(tmp_path / "keys")}
        with served(FakeEngine(tokenizer), tokenizer, **settings) as server:
            url, asks = f"{server.url}/v1/chat/completions", "access-control-request"
            for asked, status in ((origin, 200), (other, 400)):
                headers = {
                    "origin": asked,
                    f"{asks}-method": "POST",
                    f"{asks}-headers": "x-api-key",
                }
                response = httpx.options(url, headers=headers)
                assert response.status_code == status
            headers = {"origin": origin, "x-api-key": "key"}
            response = httpx.post(url, json=CHAT, headers=headers)
            assert response.headers["access-control-allow-origin"] == origin


def test_other_paths_and_methods_are_errors_of_the_same_shape(server):
    assert "/v1/images" in error_of(post(server, {}, "images"), 404)["message"]
    error_of(httpx.get(f"{server.url}/v1/chat/completions"), 405)


@pytest.mark.parametrize("known_length", [True, False])
def test_a_body_that_is_too_long_is_rejected_while_it_is_read(tokenizer, known_length):
    with served(FakeEngine(tokenizer), tokenizer, max_body_bytes=1000) as server:
        body = json.dumps({**CHAT, "user": "x" * 3_000_000}).encode()
        if not known_length:
            whole = body
            body = (whole[i : i + 50_000] for i in range(0, len(whole), 50_000))
        headers = {"content-type": "application/json"}
        url = f"{server.url}/v1/chat/completions"
        response = httpx.post(url, content=body, headers=headers)
        error = error_of(response, 413)
        assert error["code"] == "request_too_large"
        assert "1000 bytes" in error["message"]
        assert post(server, CHAT).status_code == 200


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (QueueFullError("64 requests wait already."), 429, "rate_limit_exceeded"),
        (InfeasibleBudgetError("No mask fits."), 503, "insufficient_memory"),
        (QualityFloorError("No plan is allowed."), 503, "insufficient_quality"),
        (EngineClosedError("The engine is closed."), 503, "shutting_down"),
        (InvalidRequestError("Token 99 does not exist."), 400, "invalid_value"),
        (RuntimeError("broken"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_rejections_have_a_status(tokenizer, raised, status, code, stream):
    with served(FakeEngine(tokenizer, end=raised), tokenizer) as server:
        response = post(server, {**CHAT, "stream": stream})
        error = error_of(response, status)
        assert error["code"] == code
        if status != 500:
            assert error["message"] == str(raised)
        # As long as the engine expects for a place; nothing where waiting changes nothing.
        expected = {"rate_limit_exceeded": "7", "shutting_down": "1"}
        assert response.headers.get("retry-after") == expected.get(code)
        hopeless = code.startswith("insufficient")
        assert response.headers.get("x-should-retry") == ("false" if hopeless else None)


def test_a_failure_has_a_status_or_is_the_last_event_of_a_stream(tokenizer):
    for text, stream in (("", False), ("", True), ("ab", True)):
        engine = FakeEngine(tokenizer, text, end="error", error="Out of memory.")
        with served(engine, tokenizer) as server:
            response = post(server, {**CHAT, "stream": stream})
        if not text:
            assert error_of(response, 500)["message"] == "Out of memory."
            continue
        last = [line for line in response.text.split("\n\n") if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["message"] == "Out of memory."
        assert error["request_id"] == response.headers["x-request-id"]


def test_an_empty_prompt_is_a_start_token(server):
    assert post(server, {"model": "tiny"}, "completions").status_code == 200
    assert server.service.engine.handles[-1].prompt_ids == (1,)


def test_the_process_lives_while_nothing_can_be_served(tokenizer):
    engine = FakeEngine(tokenizer)
    with served(engine, tokenizer) as server:
        assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
        engine.unready = "No plan fits."
        ready = httpx.get(f"{server.url}/readyz")
        assert ready.status_code == 503
        assert ready.json() == {"status": "not ready", "reason": "No plan fits."}
        assert httpx.get(f"{server.url}/livez").json() == {"status": "ok"}
        engine.unready = None
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "tiny"}
        engine.alive = False
        assert httpx.get(f"{server.url}/health").status_code == 503
        server.service.closing = True
        ready = httpx.get(f"{server.url}/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "The server is shutting down.")
    assert engine.closed

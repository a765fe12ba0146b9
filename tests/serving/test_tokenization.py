"""Tokens of texts and messages, by the wire format of vLLM."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import byte_tokenizer
from tests.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tokenizer):
    with served(FakeEngine(tokenizer), tokenizer) as found:
        yield found


def tokenize(server, **body):
    return httpx.post(f"{server.url}/tokenize", json=body)


def detokenize(server, **body):
    return httpx.post(f"{server.url}/detokenize", json=body)


def error_of(response, status):
    assert response.status_code == status
    return response.json()["error"]


def test_a_text_is_tokenized_and_back(server, tokenizer):
    body = tokenize(server, model="tiny", prompt="hi there", return_token_strs=True).json()
    tokens = tokenizer.encode("hi there")
    assert body == {
        "count": 8, "max_model_len": 64, "tokens": tokens, "token_strs": list("hi there"),
    }  # fmt: skip
    assert detokenize(server, tokens=tokens).json() == {"prompt": "hi there"}
    assert tokenize(server, prompt="").json()["tokens"] == []
    assert tokenize(server, prompt="a").json()["token_strs"] is None


def test_messages_are_the_tokens_of_the_prompt_of_a_chat(server, tokenizer):
    url = f"{server.url}/v1/chat/completions"
    httpx.post(url, json={"model": "tiny", "messages": MESSAGES})
    (handle,) = server.service.engine.handles
    assert tokenize(server, messages=MESSAGES).json()["tokens"] == list(handle.prompt_ids)
    without = tokenize(server, messages=MESSAGES, add_generation_prompt=False).json()
    assert tokenizer.decode(without["tokens"]) == "user: hi\n"


def test_special_tokens_are_added_to_texts_unless_told_otherwise():
    tokenizer = byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    with served(FakeEngine(tokenizer), tokenizer) as server:
        assert tokenize(server, prompt="a").json()["count"] == 2
        tokens = tokenize(server, prompt="a", add_special_tokens=False).json()["tokens"]
        assert len(tokens) == 1
        assert detokenize(server, tokens=[0, *tokens]).json() == {"prompt": "</s>a"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt", "invalid_value"),
        ({"prompt": ["a"]}, "prompt", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        ({"prompt": "a", "promt": "a"}, "promt", "unknown_parameter"),
    ],
)
def test_a_wrong_field_is_named(server, body, param, code):
    error = error_of(tokenize(server, **body), 400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("tokens", [[61], [3, 10**30], [-1], ["a"], None])
def test_only_ids_of_the_vocabulary_have_a_text(server, tokens):
    error = error_of(detokenize(server, tokens=tokens), 400)
    assert error["param"].startswith("tokens")


def test_another_model_and_a_missing_chat_template_are_reported(server):
    assert error_of(tokenize(server, model="gpt", prompt="a"), 404)["code"] == "model_not_found"
    assert error_of(detokenize(server, model="gpt", tokens=[]), 404)["code"] == "model_not_found"
    tokenizer = tiny_tokenizer()
    with served(FakeEngine(tokenizer), tokenizer) as other:
        assert error_of(tokenize(other, messages=MESSAGES), 400)["code"] == "no_chat_template"


def test_a_body_that_is_too_long_is_rejected(tokenizer):
    with served(FakeEngine(tokenizer), tokenizer, max_body_bytes=100) as server:
        assert error_of(tokenize(server, prompt="a" * 200), 413)["code"] == "request_too_large"

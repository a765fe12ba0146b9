"""Structured output through the OpenAI client, in OpenAI's and in vLLM's form."""

from __future__ import annotations

import json
import sys
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import CHAT_TEMPLATE, byte_llm

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    llm = byte_llm()
    llm.tokenizer.chat_template = CHAT_TEMPLATE
    policy = StaticPolicy(Plan(), "dense")
    controller = RuntimeController(llm, policy, lambda: 10**9, meter=TensorMeter(llm))
    with served(Engine(llm, controller), llm.tokenizer) as server, client_of(server) as found:
        yield found


def chat(client, **more):
    asked = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 300, **more}
    return client.chat.completions.create(**asked)


def complete(client, **options):
    return client.completions.create(
        model="tiny", prompt="x", max_tokens=300, extra_body={"structured_outputs": options}
    )


class Colour(BaseModel):
    name: Literal["red", "green"]
    dark: bool


def test_the_client_parses_an_answer_into_its_own_type(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=HI, max_tokens=300, seed=3, response_format=Colour
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.parsed.name in ("red", "green")


def test_a_stream_follows_the_schema_too(client):
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3}
    named = {"name": "letters", "schema": schema}
    stream = chat(client, stream=True, n=2, temperature=1, seed=1,
                  response_format={"type": "json_schema", "json_schema": named})  # fmt: skip
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        assert set(json.loads(text)) <= {"a", "b"}


def test_any_object_is_json(client):
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=40)
    assert answer.choices[0].message.content.startswith("{")
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_the_forms_of_vllm(client):
    assert complete(client, choice=["yes", "no"]).choices[0].text in ("yes", "no")
    assert set(complete(client, regex="[xy]{4}").choices[0].text) <= {"x", "y"}
    assert complete(client, grammar='root ::= "ab" "c"').choices[0].text == "abc"
    assert json.loads(complete(client, json={"enum": [7]}).choices[0].text) == 7
    assert json.loads(complete(client, json='{"enum": [[8]]}').choices[0].text) == [8]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema",
         "object"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "a", "schema": {"type": "foo"}}}},
         "response_format", "Invalid type: foo"),
        ({"extra_body": {"structured_outputs": {"regex": "(", }}}, "structured_outputs",
         "unclosed"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", 1]}}}, "structured_outputs.choice",
         "list of strings"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "json": {}}}}, "structured_outputs",
         "exactly one"),
        ({"extra_body": {"structured_outputs": {"xml": "a"}}}, "structured_outputs", "'regex'"),
        ({"response_format": {"type": "json_object"},
          "extra_body": {"structured_outputs": {"regex": "a"}}}, "structured_outputs", "Only one"),
        ({"extra_body": {"structured_outputs": {"regex": "a"}, "ignore_eos": True}}, "ignore_eos",
         "which the end token ends"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_named(client, change, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as found:
        chat(client, **change)
    assert found.value.param == param


@pytest.mark.parametrize("limit", [{"memory": "64GiB"}, {"model_memory": "1GiB"}])
def test_the_vocabulary_counts_at_the_start_within_a_limit_of_the_process(limit):
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    settings = ServerSettings(policy="dense", device="cpu", **limit)
    stack = build_stack(settings, llm=byte_llm())
    assert stack.app.state.service.builder.grammars.loaded is ("memory" in limit)
    stack.close()


def test_without_the_library_the_error_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = FakeEngine(tokenizer)
    with served(engine, tokenizer) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"rap-env\[structured\]") as found:
            chat(client, response_format={"type": "json_object"}, max_tokens=9)
        assert found.value.code == "unsupported_parameter"
        assert chat(client, response_format={"type": "text"}, max_tokens=9).choices

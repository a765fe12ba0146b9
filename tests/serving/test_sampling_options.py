"""Options of an answer's tokens and its grammar, through the OpenAI client and a tiny model."""

import json
import re
import sys
from typing import Literal

import openai
import pytest
import torch
from pydantic import BaseModel

from rap_env.runtime.structured_output import closed_schema
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from tests.serving.conftest import HI, chat, client_of, dense_engine, served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import CHAT_TEMPLATE, byte_llm
from tests.tiny import tiny_llm


@pytest.fixture(scope="module")
def llm(tokenizer):
    return tiny_llm(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def client(llm, tokenizer):
    engine = dense_engine(llm, prefill_chunk_tokens=4)
    with served(engine, tokenizer) as server, client_of(server) as opened:
        yield opened


def complete(client, **more):
    asked = {"model": "tiny", "prompt": "a big cat", "temperature": 0, "max_tokens": 4, **more}
    return client.completions.create(**asked)


@torch.no_grad()
def logprobs_of(llm, tokenizer, text):
    """Of each token of a text after the first one, and of every token in its place."""
    ids = torch.tensor([tokenizer.encode(text)])
    every = torch.log_softmax(llm.model(ids).logits[0].float(), dim=-1)[:-1]
    return every.gather(1, ids[0, 1:, None])[:, 0], every


def test_likely_tokens_of_a_chat(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    assert len(choice.logprobs.content) == 10
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (
            entry.token, entry.logprob,
        )  # fmt: skip
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize("stream", [False, True])
def test_likely_tokens_of_a_plain_completion(client, llm, tokenizer, stream):
    answer = complete(client, logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    text = "".join(choice.text for choice in choices)
    assert [token for part in found for token in part.tokens] == list(text)
    assert [offset for part in found for offset in part.text_offset] == list(range(4))
    ids = torch.tensor([tokenizer.encode("a big cat" + text)])
    with torch.no_grad():
        likely = torch.log_softmax(llm.model(ids).logits[0, -5:-1].float(), dim=-1).topk(2).values
    own = [value for part in found for value in part.token_logprobs]
    assert own == pytest.approx(likely[:, 0].tolist(), abs=1e-4)
    top = [value for part in found for entry in part.top_logprobs for value in entry.values()]
    assert sorted(top) == pytest.approx(sorted(likely.flatten().tolist()), abs=1e-4)
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_with_log_probabilities_scores_the_prompt(client, llm, tokenizer, as_ids):
    text = "a big cat"
    prompt = tokenizer.encode(text) if as_ids else text
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=1).choices
    found = choice.logprobs
    assert choice.text == "".join(found.tokens)
    assert found.tokens[: len(text)] == list(text)
    assert len(found.tokens) == len(text) + 1
    assert found.text_offset == list(range(len(text) + 1))
    expected, every = logprobs_of(llm, tokenizer, text)
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
    best = [max(likely.values()) for likely in found.top_logprobs[1:-1]]
    assert best == pytest.approx(every.max(dim=-1).values.tolist(), abs=1e-4)


def test_an_echo_comes_first_in_a_stream_and_no_stop_string_is_sought_in_it(client):
    plain = complete(client).choices[0].text
    streamed = "".join(
        c.choices[0].text for c in complete(client, echo=True, stop=["big"], stream=True)
    )
    assert streamed == "a big cat" + plain


def test_a_stop_token_is_scored_in_a_plain_completion(client, tokenizer):
    stop = {str(tokenizer.eos_token_id): 100}
    (choice,) = complete(client, echo=True, logprobs=1, max_tokens=1, logit_bias=stop).choices
    assert choice.finish_reason == "stop"
    assert choice.text == "a big cat"
    assert choice.logprobs.tokens == [*"a big cat", "</s>"]


def test_penalties_and_biases_reach_the_sampler(client, tokenizer):
    repeated = chat(client, logit_bias={str(tokenizer.encode("q")[0]): 100})
    assert repeated.choices[0].message.content == "q" * 10
    others = chat(client, frequency_penalty=2, presence_penalty=2, max_tokens=30)
    free = chat(client, max_tokens=30)
    distinct = [len(set(found.choices[0].message.content)) for found in (others, free)]
    assert distinct[0] > distinct[1]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"100000": 1}}, None),  # no such token
    ],
)
def test_options_out_of_range_are_named(client, change, param):
    with pytest.raises(openai.BadRequestError, match=param or "100000") as raised:
        chat(client, **change)
    assert param in (raised.value.param, None)


@pytest.fixture(scope="module")
def byte_client():
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    llm = byte_llm()
    llm.tokenizer.chat_template = CHAT_TEMPLATE
    with served(dense_engine(llm), llm.tokenizer) as server, client_of(server) as opened:
        yield opened


class Colour(BaseModel):
    name: Literal["red", "green"]
    dark: bool


def test_the_client_parses_an_answer_into_its_own_type(byte_client):
    answer = byte_client.chat.completions.parse(
        model="tiny", messages=HI, max_tokens=300, seed=3, response_format=Colour
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.parsed.name in ("red", "green")


def test_any_object_and_plain_completions(byte_client):
    (choice,) = chat(byte_client, response_format={"type": "json_object"}, max_tokens=40).choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason in ("stop", "length")
    named = {"name": "a", "schema": {"enum": [[8]]}}
    answer = byte_client.completions.create(
        model="tiny", prompt="x", max_tokens=300,
        extra_body={"response_format": {"type": "json_schema", "json_schema": named}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].text) == [8]


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"guided_json": '{"enum": ["yes"]}'}, '"yes"'),
        ({"response_format": {"type": "json_object", "schema": {"const": 1}}}, "1"),
    ],
)
def test_an_answer_follows_what_clients_of_other_servers_send(byte_client, asked, pattern):
    answer = chat(byte_client, max_tokens=300, extra_body=asked, temperature=1)
    assert re.fullmatch(pattern, answer.choices[0].message.content)
    assert answer.rap["ignored"] == []


def test_objects_are_closed_and_keywords_without_support_left_out(byte_client):
    items = {"type": "array", "items": {"enum": [1]}, "maxItems": 1, "uniqueItems": True}
    schema = {"type": "object", "properties": {"a": items}, "required": ["a"]}
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(3):
        answer = chat(byte_client, response_format=named, max_tokens=300, temperature=1, seed=seed)
        assert json.loads(answer.choices[0].message.content).keys() == {"a"}
        assert answer.rap["ignored"] == ['response_format: Unimplemented keys: ["uniqueItems"]']
    inner = {"properties": {"b": {}}}
    assert closed_schema({"anyOf": [inner]})["anyOf"][0]["additionalProperties"] is False
    for own in (
        {**inner, "additionalProperties": {}},
        {"allOf": [inner, inner]},
        {"enum": [inner]},
    ):
        assert closed_schema(own) == own


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema",
         "object"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "a", "schema": {"type": "foo"}}}},
         "response_format", "Invalid type: foo"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_named(byte_client, change, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as found:
        chat(byte_client, **change)
    assert found.value.param == param


@pytest.mark.parametrize("limit", [{"memory": "64GiB"}, {"model_memory": "1GiB"}, {}])
def test_the_vocabulary_is_loaded_before_the_first_baseline_whatever_is_limited(limit):
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    settings = ServerSettings(policy="dense", device="cpu", **limit)
    stack = build_stack(settings, llm=byte_llm())
    assert stack.app.state.service.builder.grammars._vocabulary is not None


def test_without_the_library_the_error_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = FakeEngine(tokenizer)
    with served(engine, tokenizer) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"rap-env\[structured\]") as found:
            chat(client, response_format={"type": "json_object"}, max_tokens=9)
        assert found.value.code == "unsupported_parameter"
        assert chat(client, response_format={"type": "text"}, max_tokens=9).choices

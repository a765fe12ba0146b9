"""Log probabilities, penalties, biases and echoes, through the OpenAI client and a tiny model."""

from __future__ import annotations

import openai
import pytest
import torch

from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import TensorMeter
from tests.serving.conftest import client_of, served
from tests.tiny import tiny_llm

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(tokenizer):
    return tiny_llm(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def client(llm, tokenizer):
    policy = StaticPolicy(Plan(), "dense")
    controller = RuntimeController(llm, policy, lambda: 10**9, meter=TensorMeter(llm))
    engine = Engine(llm, controller, prefill_chunk_tokens=4)
    with served(engine, tokenizer) as server, client_of(server) as found:
        yield found


def chat(client, **more):
    asked = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 10, **more}
    return client.chat.completions.create(**asked)


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
    with chat(client, logprobs=True, top_logprobs=3, stream=True) as stream:
        streamed = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    assert [e for found in streamed for e in found.content] == choice.logprobs.content


def test_likely_tokens_of_a_plain_completion_have_the_chosen_one_too(client):
    found = complete(client, logprobs=2, logit_bias={"9": 100}).choices[0].logprobs
    assert len(found.top_logprobs) == 4
    for token, logprob, likely in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert likely[token] == logprob
        assert len(likely) in (2, 3)


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


def test_an_echo_of_no_new_tokens_is_the_prompt_alone(client):
    answer = complete(client, prompt=["ab", "cde"], echo=True, logprobs=0, max_tokens=0)
    assert [choice.text for choice in answer.choices] == ["ab", "cde"]
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [2, 3]
    assert answer.usage.completion_tokens == 0
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


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
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_options_out_of_range_are_named(client, change, param):
    with pytest.raises(openai.BadRequestError) as found:
        chat(client, **change)
    assert found.value.param == param


def test_a_bias_on_a_token_that_does_not_exist_is_rejected(client):
    with pytest.raises(openai.BadRequestError, match="100000"):
        chat(client, logit_bias={"100000": 1})


def test_no_tokens_need_an_echo(client):
    with pytest.raises(openai.BadRequestError, match="echo"):
        complete(client, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        complete(client, logprobs=6)


def test_embeddings_are_not_served(client):
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="hi", encoding_format="float")

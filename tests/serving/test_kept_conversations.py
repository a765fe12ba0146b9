"""Answers say what was kept of earlier requests, and each client finds only its own."""

import logging
import re

import httpx
import pytest

from rap_env.errors import RapError
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.serving.prompts import WrittenAnswers, encode_parts
from rap_env.serving.settings import ServerSettings
from tests.serving.background import BackgroundServer
from tests.serving.conftest import HI, chat, client_of, dense_engine, served, tiny_stack
from tests.serving.tokenizers import byte_llm, merging_tokenizer, tool_tokenizer
from tests.tiny import tiny_llm


def engine(tokenizer, **settings):
    return dense_engine(tiny_llm(tokenizer=tokenizer, positions=256), **settings)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("first\nsecond\n")
    return {"api_key_file": str(path)}


def complete(client, prompt, **body):
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=4, temperature=0, extra_body=body
    )


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


TEXT = "the same beginning, again and again. "


def test_an_answer_says_how_many_tokens_of_its_prompt_were_kept(tokenizer):
    with served(engine(tokenizer), tokenizer) as server, client_of(server) as client:
        first = complete(client, TEXT)
        second = complete(client, TEXT + "more")
        assert (cached(first), cached(second)) == (0, first.usage.prompt_tokens)
        reports = [answer.model_extra["rap"] for answer in (first, second)]
        assert [report["kept_tokens"] for report in reports] == [0, cached(second)]
        assert [report["kept_levels"] for report in reports] == [{}, {"native": cached(second)}]
        assert [report["kept_file_tokens"] for report in reports] == [0, 0]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert f'rap_tokens_total{{part="kept"}} {cached(second)}.0' in metrics
        assert "rap_kept_sequences 2.0" in metrics
        assert 'rap_memory_held_bytes{part="kept"} 0.0' not in metrics


def test_a_stream_and_the_line_of_the_log_say_it_too(tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.serving")
    with served(engine(tokenizer), tokenizer) as server, client_of(server) as client:
        complete(client, TEXT)
        body = {"model": "tiny", "prompt": TEXT + "more", "max_tokens": 4}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = client.completions.create(**body, **options)
        assert cached(last) == last.model_extra["rap"]["kept_tokens"] == len(TEXT)
    first, second = [r.message for r in caplog.records if r.name == "rap_env.serving.http"]
    assert "kept_levels" not in first
    assert f" kept_tokens={len(TEXT)} kept_levels=native:{len(TEXT)} " in second


def test_answers_to_one_prompt_are_counted_once(tokenizer):
    with served(engine(tokenizer), tokenizer) as server, client_of(server) as client:
        first = complete(client, TEXT, n=3)
        again = complete(client, TEXT, n=3)
        assert (cached(first), cached(again)) == (0, first.usage.prompt_tokens - 1)


def test_a_key_finds_only_what_is_its_own(tokenizer, keys):
    with served(engine(tokenizer), tokenizer, **keys) as server:
        counts = []
        for key in ("first", "second", "first"):
            with client_of(server, api_key=key) as client:
                counts.append(cached(complete(client, TEXT)))
        assert counts == [0, 0, len(TEXT) - 1]


def test_a_salt_separates_further(tokenizer):
    with served(engine(tokenizer), tokenizer) as server, client_of(server) as client:
        salts = ("a", "b", None, "a")
        counts = [cached(complete(client, TEXT, **({"cache_salt": s} if s else {}))) for s in salts]
        assert counts == [0, 0, 0, len(TEXT) - 1]


def test_a_history_has_the_tokens_in_which_its_answers_were_written():
    merging = merging_tokenizer()
    letter = merging.convert_tokens_to_ids("a")
    with served(engine(merging), merging) as server, client_of(server) as client:
        first = chat(client, logit_bias={letter: 100})
        text = first.choices[0].message.content
        assert text == "a" * 10
        assert len(merging.encode(text, add_special_tokens=False)) == 5
        history = [*HI, {"role": "assistant", "content": text}, {"role": "user", "content": "on"}]
        second = chat(client, messages=history)
        # The last token of an answer is not fed back.
        assert cached(second) == first.usage.prompt_tokens + 9
        salted = chat(client, messages=history, extra_body={"cache_salt": "other"})
        assert salted.usage.prompt_tokens == second.usage.prompt_tokens - 5


def test_written_answers_stand_where_the_text_has_them():
    def encoded(text, *parts):
        special = re.compile(r"<abba>")
        return encode_parts(text, parts, lambda part: [ord(letter) for letter in part], special)

    a, b, known = ord("a"), ord("b"), ("bb", [7, 7])
    assert encoded("abba", known) == [a, 7, 7, a]
    assert encoded("abba", ("bb", None)) == [a, b, b, a]
    assert encoded("bbabb", ("bba", None), known) == [b, b, a, 7, 7]  # in their order
    ids = encoded("<abba>bb", known)
    assert ids == [*map(ord, "<abba>"), 7, 7]  # not within a special token
    assert encoded("aba", ("", None), known) == [a, b, a]  # a template may change what it is given


def test_the_oldest_answers_are_forgotten():
    answers = WrittenAnswers(most_tokens=12)
    answers.add("me", "key", "bb", [7, 7])
    assert answers.get("me", "key") == ("bb", (7, 7))
    assert answers.get("you", "key") is None
    answers.add("me", "other", "a", [3] * 10)
    assert answers.get("me", "key") is None


def test_answers_without_tokens_are_forgotten_too():
    answers = WrittenAnswers(most_tokens=12)
    for number in range(20):
        answers.add(f"salt {number}", "key", "", [])
    known = [answers.get(f"salt {number}", "key") is not None for number in range(20)]
    assert known == [False] * 8 + [True] * 12


@pytest.mark.parametrize("form", ["tagged", "bare"])
def test_calls_in_a_history_have_the_tokens_in_which_they_were_written(form):
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    llm = byte_llm(4096, tool_tokenizer(form))
    words = {"type": "string", "enum": ["R\u00f6m"]}  # a template writes it with its code
    schema = {"properties": {"city": words}, "required": ["city"], "additionalProperties": False}
    function = {"name": "weather", "parameters": {"type": "object", **schema}}
    ask = {"tools": [{"type": "function", "function": function}], "max_tokens": 300}
    ask |= {"tool_choice": "required", "parallel_tool_calls": False}
    with served(dense_engine(llm), llm.tokenizer) as server, client_of(server) as client:
        first = chat(client, **ask)
        message = first.choices[0].message
        (call,) = message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
        messages = [*HI, message, result]
        count = first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert abs(cached(chat(client, messages=messages, **ask)) - count) <= 1
        call.function.arguments = '{"city": "Oslo"}'  # no answer of this server
        changed = cached(chat(client, messages=messages, **ask))
        assert changed < count - 10


def test_the_server_s_settings_reach_the_engine(tokenizer):
    for keep in ("on", "off"):
        stack = tiny_stack(
            tokenizer, lambda _: StaticPolicy(Plan(), "dense"), lambda: 10**9,
            max_delta_nll=None, keep=keep, keep_delta_nll=0.25,
            keep_file_bytes="1MiB",
        )  # fmt: skip
        with BackgroundServer(stack.app) as server, client_of(server) as client:
            prompt = TEXT[:20]
            counts = [cached(complete(client, prompt)) for _ in range(2)]
            assert "rap_kept_file_bytes 0.0" in httpx.get(f"{server.url}/metrics").text
        assert counts == [0, 19 if keep == "on" else 0]
        kept = stack.engine._scheduler._kept
        assert (kept.quality.max_rise, kept.files.most_bytes) == (0.25, 2**20)
    with pytest.raises(RapError, match="keep"):
        ServerSettings(keep="maybe")
    with pytest.raises(RapError, match="keep_file_bytes must be a number of bytes"):
        ServerSettings(keep_file_bytes="2G")

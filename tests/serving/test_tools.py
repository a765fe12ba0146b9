"""Tools through the OpenAI client: what templates get, and answers that are calls."""

from __future__ import annotations

import contextlib
import json

import openai
import pytest

from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import byte_tokenizer, chat_tokenizer

TEMPLATE = """{%- if tools %}{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}[{{ message.role }}] {{ message.content }}
{%- for call in message.tool_calls %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}
{% endfor %}[assistant] """
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "days": {"enum": [1, 2]}, "place": {"$ref": "#/$defs/place"},
            },
            "required": ["days", "place"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["here", "there"]}},
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"days": 1}}\n</tool_call>'


def tool_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(client, **more):
    asked = {"model": "tiny", "messages": HI, "temperature": 0, "tools": TOOLS, **more}
    return client.chat.completions.create(**asked)


@pytest.fixture
def fake():
    engine = FakeEngine(tool_tokenizer(), f"Look:\n{CALL}\n{CALL}")
    engine.max_seq_len_tokens = 4096
    return engine


@pytest.fixture
def client(fake):
    with served(fake, tool_tokenizer()) as server, client_of(server) as found:
        yield found


def test_calls_of_an_answer(client):
    (choice,) = chat(client).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look:"
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"days": 1}
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_calls_of_a_stream(client):
    with chat(client, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Look:"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather"), (1, "weather")]
    assert chunks[-1].finish_reason == "tool_calls"


def test_one_call_ends_the_answer_if_only_one_is_wanted(client, fake):
    (choice,) = chat(client, parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"
    assert fake.handles[0].cancelled


def test_without_tools_or_with_none_a_call_is_text(client, fake):
    for more in ({"tools": []}, {"tool_choice": "none"}):
        (choice,) = chat(client, **more).choices
        assert choice.message.tool_calls is None
        assert CALL in choice.message.content
        assert choice.finish_reason == "stop"
        assert "weather" not in prompt_of(fake)


def prompt_of(engine):
    return tool_tokenizer().decode(engine.handles[-1].prompt_ids)


def test_the_template_gets_tools_calls_and_results(client, fake):
    (choice,) = chat(client).choices
    assert prompt_of(fake).startswith(json.dumps(WEATHER["function"], ensure_ascii=False))
    assert '{"name": "clock"}' in prompt_of(fake)
    call = choice.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    asked = choice.message.model_dump(exclude_none=True)
    chat(client, messages=[*HI, asked, result])
    assert f"[assistant] Look:{CALL}" in prompt_of(fake)
    assert prompt_of(fake).endswith("[tool] rain[assistant] ")
    chat(client, messages=[*HI, {**asked, "content": None}, result])
    assert f"[assistant] {CALL}" in prompt_of(fake)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tools": [{"type": "search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name",
         "pattern"),
        ({"tool_choice": "always"}, "tool_choice", "required"),
        ({"tool_choice": {"type": "function", "function": {"name": "sun"}}}, "tool_choice",
         "'sun'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no 'tools'"),
        ({"response_format": {"type": "json_object"}}, "tools", "combined"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]",
         "'user'"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0]", "JSON text"),
        ({"functions": [{"name": "a"}]}, "functions", "tools"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(client, change, param, words):
    extra = {"extra_body": {"functions": change.pop("functions")}} if "functions" in change else {}
    with pytest.raises(openai.BadRequestError, match=words) as found:
        chat(client, **change, **extra)
    assert found.value.param == param


@pytest.mark.parametrize("template", [None, "<function= {{ tools }}"])
def test_a_template_without_tools_is_named(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    with served(FakeEngine(tokenizer), tokenizer) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="template") as found:
            chat(client)
        assert (found.value.param, found.value.code) == ("tools", "unsupported_parameter")
        if template is None:
            called = {"role": "tool", "tool_call_id": "1", "content": "a"}
            with pytest.raises(openai.BadRequestError, match="no tools"):
                chat(client, messages=[*HI, called], tools=[])


MARKED = "{{ tools }}{{ messages[0].content }}[TOOL_CALLS] "
BARE = '{{ tools }}{{ messages[0].content }} Write {"name": ..., "parameters": ...}: '


@pytest.fixture
def forced():
    """A function that serves a template: its engine plays what the constraint allows."""
    pytest.importorskip("llguidance", reason="the extra structured is not installed")

    @contextlib.contextmanager
    def start(template, special=()):
        tokenizer = tool_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        engine = FakeEngine(tokenizer)
        engine.max_seq_len_tokens, engine.vocab_size = 4096, 300
        engine.llm.model.generation_config.eos_token_id = None
        with served(engine, tokenizer) as server, client_of(server) as found:
            yield found, engine

    return start


@pytest.mark.parametrize("template", [TEMPLATE, MARKED, BARE], ids=["tags", "marked", "bare"])
@pytest.mark.parametrize("special", [(), ("[TOOL_CALLS]", "<tool_call>")], ids=["text", "special"])
def test_a_forced_answer_is_calls_alone(forced, template, special):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    named = {"type": "function", "function": {"name": "weather"}}
    with forced(template, special) as (client, engine):
        for more in ({"tools": [strict], "tool_choice": "required"}, {"tool_choice": named}):
            (choice,) = chat(client, max_tokens=2000, seed=3, **more).choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            for call in choice.message.tool_calls:
                assert call.function.name == "weather"
                arguments = json.loads(call.function.arguments)
                assert arguments["days"] in (1, 2)
                assert arguments["place"] in ("here", "there")
                assert len(call.id) == (9 if template is MARKED else 29)
        assert len(choice.message.tool_calls) == 1
        if special and template is not BARE:
            assert engine.handles[0].token_ids[0] > 256  # the special token, not its letters


def test_a_forced_answer_may_be_too_long(forced):
    with (
        forced(TEMPLATE) as (client, _),
        chat(client, stream=True, max_tokens=30, tool_choice="required") as stream,
    ):
        chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[-1].finish_reason == "length"
    assert not any(chunk.delta.tool_calls for chunk in chunks)
    assert "".join(chunk.delta.content or "" for chunk in chunks).startswith("<tool_call>")


def test_parameters_that_no_grammar_can_follow_are_named(forced):
    wrong = {"name": "weather", "parameters": {"type": "foo"}}
    with (
        forced(TEMPLATE) as (client, _),
        pytest.raises(openai.BadRequestError, match="foo") as found,
    ):
        chat(client, tools=[{"type": "function", "function": wrong}], tool_choice="required")
    assert found.value.param == "tool_choice"

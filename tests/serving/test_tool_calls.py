"""Tool calls in the text of answers, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest

from rap_env.serving.tool_calls import BARE_JSON, MISTRAL, TAGS, ToolCallParser, tool_format

NAMES = ("weather", "time")
CALL = '{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
OTHER = '{"name": "time", "arguments": {}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"


def parsed(form, text, size, **settings):
    """The text and the calls in a text that comes in pieces of a size."""
    parser = ToolCallParser(form, NAMES, **settings)
    pieces = [parser.add(text[i : i + size]) for i in range(0, len(text), size)]
    pieces.append(parser.finish())
    calls = [(call.name, json.loads(call.arguments)) for _, found in pieces for call in found]
    return "".join(piece for piece, _ in pieces), calls


WEATHER, TIME = ("weather", {"city": "Zürich", "days": 2}), ("time", {})


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "written", "text", "calls"),
    [
        (TAGS, TAGGED, "", [WEATHER]),
        (TAGS, f"Let me see.\n{TAGGED}\n<tool_call>{OTHER}</tool_call>\n", "Let me see.",
         [WEATHER, TIME]),
        (TAGS, f"<tool_call>[{CALL}, {OTHER}]</tool_call>", "", [WEATHER, TIME]),
        (TAGS, "a <tool x <tool_call", "a <tool x <tool_call", []),
        (TAGS, " \n<tool_call>{]</tool_call> b", " \n<tool_call>{]</tool_call> b", []),
        (TAGS, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
         '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
        (TAGS, f"<tool_call>{CALL}", "", [WEATHER]),  # the end tag was a stop token
        (TAGS, '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [WEATHER, TIME]),
        (MISTRAL, "Hello [T] there ", "Hello [T] there ", []),
        (BARE_JSON, CALL.replace("arguments", "parameters"), "", [WEATHER]),
        (BARE_JSON, f" <|python_tag|>{CALL}; {OTHER}", "", [WEATHER, TIME]),
        (BARE_JSON, '{"answer": 5}', '{"answer": 5}', []),
        (BARE_JSON, f"The call is {CALL}", f"The call is {CALL}", []),
        (BARE_JSON, '{"name": "time", "parameters": "{}"}', "", [TIME]),
    ],
)  # fmt: skip
def test_calls_are_separated_from_text(form, written, text, calls, size):
    assert parsed(form, written, size) == (text, calls)


def test_text_comes_at_once_and_what_may_be_a_call_when_it_is_none():
    parser = ToolCallParser(TAGS, NAMES)
    assert [parser.add(piece)[0] for piece in ("Well ", "<to", "ad>", " <tool_call", ">")] == [
        "Well", "", " <toad>", "", "",
    ]  # fmt: skip
    _, (call,) = parser.add(f"{OTHER}</tool_call>")
    assert call.name == "time"


@pytest.mark.parametrize("form", [TAGS, MISTRAL, BARE_JSON])
def test_a_single_call_is_the_last_thing_in_an_answer(form):
    written = {
        TAGS: f"{TAGGED} and {TAGGED}", MISTRAL: f"[TOOL_CALLS][{CALL}, {OTHER}]",
        BARE_JSON: f"{CALL};{OTHER}",
    }  # fmt: skip
    assert parsed(form, written[form], 5, single=True) == ("", [WEATHER])


def test_ids_differ_and_are_those_that_templates_take():
    ids = {form.new_id() for form in (TAGS, MISTRAL, BARE_JSON) for _ in range(20)}
    assert len(ids) == 60
    assert MISTRAL.new_id().isalnum()
    assert len(MISTRAL.new_id()) == 9


def test_the_form_is_that_of_the_template():
    assert tool_format("... <tool_call>\n{'name': ...") == TAGS
    assert tool_format("{{ '[TOOL_CALLS] [' }}") == MISTRAL
    assert tool_format('Respond in the format {"name": function name, "parameters": ...') == (
        BARE_JSON
    )
    assert tool_format("<tool_call>\n<function=...") is None
    assert tool_format("[TOOL_CALLS]name[ARGS]{}") is None
    assert tool_format("{% for tool in tools %}{{ tool }}{% endfor %}") is None

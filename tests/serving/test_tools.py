"""Tools: the forms in which models call them, and whole loops with the OpenAI client."""

import itertools
import json
import random
import sys
from functools import partial
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from rap_env.errors import UnsupportedModelError
from rap_env.serving.prompts import in_template
from rap_env.serving.schemas import ChatCompletionRequest
from rap_env.serving.tool_calls import CallForm, ToolCallParser
from tests.serving.conftest import chat, client_of, dense_engine, served
from tests.serving.fake_engine import FakeEngine
from tests.serving.tokenizers import CHAT_TEMPLATE, TOOL_TEMPLATES, byte_llm, tool_tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name="weather", parameters=CITY, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


ROME = '{"name": "weather", "KEY": {"city": "Rome"}}'
OSLO = ROME.replace("Rome", "Oslo")
OTHER = '{"name": "other", "KEY": {"city": "Rome"}}'
WRITTEN = {
    "tagged": ("<tool_call>\n%s\n</tool_call>", "\n</tool_call>\n<tool_call>\n", "arguments"),
    "bare": ("%s", "; ", "parameters"),
    "listed": ("[TOOL_CALLS] [%s]", ", ", "arguments"),
}
"""Around the calls of an answer, between them, and the key of their arguments, in each form."""


def written(form, *calls):
    around, between, key = WRITTEN[form]
    return around % between.join(calls).replace("KEY", key)


def form_of(tokenizer):
    return CallForm.of_template(partial(in_template, tokenizer), tokenizer)


def split(parser, pieces):
    content, calls = "", []
    for piece in [*pieces, None]:
        new, calls = parser.add(piece or "", ended=piece is None)
        content += new
    return content, [json.loads(call["function"]["arguments"])["city"] for call in calls]


@pytest.mark.parametrize("form", TOOL_TEMPLATES)
def test_the_form_of_calls_is_that_of_the_template(form):
    found = form_of(tool_tokenizer(form))
    assert (found.marker, found.bracket, found.closing) == {
        "tagged": ("<tool_call>", "\n", "\n</tool_call>"),
        "bare": ("", "", ""),
        "listed": ("[TOOL_CALLS]", " [", "]"),
    }[form]
    assert found.key == WRITTEN[form][2]
    assert (found.marker_id is not None) == (form == "listed")


def test_a_prompt_that_opens_a_thought_hides_no_form():
    tokenizer = tool_tokenizer("tagged")
    opened = tokenizer.chat_template.replace("'assistant: '", "'assistant: <think>\\n'")
    tokenizer.chat_template = opened
    assert form_of(tokenizer).marker == "<tool_call>"


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, "{% if tools %}{{ tools }}{% endif %}" + CHAT_TEMPLATE,
     "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('x') }}"
     "{% endif %}{% endfor %}" + TOOL_TEMPLATES["tagged"],
     TOOL_TEMPLATES["tagged"].replace("call.function | tojson", "call.function.name")],
    ids=["no tools", "no calls", "no results", "no JSON"],
)  # fmt: skip
def test_a_template_without_calls_in_json_is_an_error(template):
    tokenizer = tool_tokenizer("tagged")
    tokenizer.chat_template = template
    with pytest.raises(UnsupportedModelError, match="writes no tool calls"):
        form_of(tokenizer)


@pytest.mark.parametrize("form", TOOL_TEMPLATES)
def test_any_cut_of_an_answer_has_the_same_content_and_calls(form):
    found, drawn = form_of(tool_tokenizer(form)), random.Random(0)
    swapped = '{"KEY": {"city": "Oslo"},\n "name": "weather"}'
    before = "" if form == "bare" else "Let me see.\n\n"
    answers = {
        before + written(form, ROME): (before.strip(), ["Rome"]),
        before + written(form, ROME, swapped): (before.strip(), ["Rome", "Oslo"]),
        written(form, OTHER): (written(form, OTHER), []),
        written(form, ROME)[:-20]: (written(form, ROME)[:-20], []),
        'An <tool> of {"name": 5} [TOOL': ('An <tool> of {"name": 5} [TOOL', []),
        '[1] {"a": {"name": ["weather"]}} ': ('[1] {"a": {"name": ["weather"]}} ', []),
        written(form, ROME) + "\nThat is all.": ("\nThat is all.", ["Rome"]),
        "": ("", []),
    }
    for answer, expected in answers.items():
        for _ in range(20):
            cuts = sorted(drawn.choices(range(len(answer) + 1), k=5))
            ends = itertools.pairwise([0, *cuts, len(answer)])
            pieces = [answer[start:end] for start, end in ends]
            assert split(ToolCallParser(found, ["weather"]), pieces) == expected
    parser = ToolCallParser(found, ["weather"], single=True)
    assert split(parser, written(form, ROME, OSLO)) == ("", ["Rome"])


def test_text_without_calls_is_content_at_once():
    for form in TOOL_TEMPLATES:
        parser = ToolCallParser(form_of(tool_tokenizer(form)), ["weather"])
        assert [parser.add(piece, ended=False)[0] for piece in ("It", " is")] == ["It", " is"]


@pytest.mark.parametrize("form", TOOL_TEMPLATES)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_free_text_are_those_of_the_api(form, stream):
    tokenizer = tool_tokenizer(form)
    engine = FakeEngine(tokenizer, written(form, ROME, OSLO))
    engine.max_seq_len_tokens = 4096
    ask = {"tools": [tool(), tool("b")], "max_tokens": 500, "logprobs": True}
    with served(engine, tokenizer) as server, client_of(server) as client:
        if stream:
            *chunks, end = [chunk.choices[0] for chunk in chat(client, stream=True, **ask)]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            assert [call.index for call in calls] == [0, 1]
            assert end.finish_reason == "tool_calls"
        else:
            (choice,) = chat(client, **ask).choices
            assert choice.message.content is None
            assert choice.finish_reason == "tool_calls"
            calls = choice.message.tool_calls
            assert len(choice.logprobs.content) == len(engine.tokens)
        assert [(call.type, call.function.name) for call in calls] == [("function", "weather")] * 2
        assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Rome", "Oslo"]
        assert len({call.id for call in calls}) == 2
        if not stream:
            (choice,) = chat(client, **ask, parallel_tool_calls=False).choices
            assert len(choice.message.tool_calls) == 1
            (choice,) = chat(client, **ask, tool_choice="none").choices
            assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
            assert "weather" in choice.message.content
            (choice,) = chat(client, **{**ask, "max_tokens": 30}).choices
            assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")


@pytest.fixture(scope="module", params=TOOL_TEMPLATES)
def live(request):
    """A server over a real engine with random weights, and its client."""
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    llm = byte_llm(4096, tool_tokenizer(request.param))
    with served(dense_engine(llm), llm.tokenizer) as server, client_of(server) as client:
        yield server, client


def test_a_loop_of_call_result_and_answer(live):
    server, client = live
    messages = [{"role": "user", "content": "Rome?"}]
    ask = {"tools": [tool()], "max_tokens": 300, "temperature": 1, "seed": 4}
    for parallel in (True, False):
        needed = {"tool_choice": "required", "parallel_tool_calls": parallel}
        (choice,) = chat(client, messages=messages, **ask, **needed).choices
        for call in choice.message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    messages += [choice.message.model_dump(), result]
    answer = chat(client, messages=messages, **{**ask, "max_tokens": 16}, tool_choice="none")
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    body = {"model": "tiny", "messages": messages, "tools": [tool()]}
    asked = ChatCompletionRequest.model_validate(body)
    ids = server.service.builder.encode_chat(asked, "another one")
    text = server.service.tokenizer.decode(ids)
    assert text.startswith('tools: [{"type": "function", "function": {"name": "weather"')
    assert "tool weather: 12 degrees\nassistant: " in text
    assert call.function.arguments in text


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2]


def test_the_client_parses_strict_arguments_of_a_stream(live):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
    needed = {"tool_choice": "required", "parallel_tool_calls": False}
    tools = [openai.pydantic_function_tool(Weather)]
    with live[1].chat.completions.stream(**ask, **needed, tools=tools) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_strict_function_is_called_by_its_schema_or_not_at_all():
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    for form in TOOL_TEMPLATES:
        llm = byte_llm(tokenizer=tool_tokenizer(form))
        compiler = served_grammars(llm)
        text = form_of(llm.tokenizer).grammar({"weather": CITY}, required=False, single=False)
        make = compiler.compile("grammar", text)
        london = ROME.replace("Rome", "London")
        fits = ["", "hello", written(form, ROME)]
        fits += ["hello " + written(form, ROME), "a < b [1]"] if form != "bare" else []
        for answer in fits:
            assert follows(make(), llm.tokenizer, answer), (form, answer)
        for answer in (written(form, london), written(form, OTHER)):
            assert not follows(make(), llm.tokenizer, answer), (form, answer)


def test_a_format_holds_for_answers_that_do_not_call():
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    for form in TOOL_TEMPLATES:
        llm = byte_llm(tokenizer=tool_tokenizer(form))
        grammar = form_of(llm.tokenizer).grammar
        text = grammar({"weather": CITY}, required=False, single=False, answer=CITY)
        make = served_grammars(llm).compile("grammar", text)
        for answer in ('{"city": "Oslo"}', written(form, ROME)):
            assert follows(make(), llm.tokenizer, answer), (form, answer)
        for answer in ("", "hello", "hello " + written(form, ROME), '{"city": "London"}'):
            assert not follows(make(), llm.tokenizer, answer), (form, answer)


def test_the_newer_api_calls_tools_and_reads_their_results(live):
    flat = {"type": "function", **tool()["function"]}
    ask = {"model": "tiny", "tools": [flat], "temperature": 1, "extra_body": {"seed": 4}}
    (call,) = live[1].responses.create(**ask, input="Rome?", tool_choice="required").output[:1]
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    again = [{"role": "user", "content": "Rome?"}, call.model_dump(), told]
    with live[1].responses.stream(
        **ask, input=again, tool_choice={"type": "function", "name": "weather"}
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output[0].type == "function_call"
    assert kinds[0] == "response.created"
    assert "response.function_call_arguments.done" in kinds


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_an_answer_beside_tools_is_a_call_or_has_the_format(live, choice):
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    ask = {"tools": [tool()], "max_tokens": 300, "temperature": 1, "response_format": schema}
    calls = 0
    for seed in range(2):
        (answer,) = chat(live[1], **ask, tool_choice=choice, seed=seed).choices
        calls += bool(answer.message.tool_calls)
        if not answer.message.tool_calls:
            assert json.loads(answer.message.content)["city"] in ("Rome", "Oslo")
    assert calls == 2 or choice == "auto"


def served_grammars(llm):
    from rap_env.serving.prompts import grammar_compiler

    return grammar_compiler(llm, llm.tokenizer, 300)


def follows(matcher, tokenizer, text):
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return True


CALLED = {"role": "assistant", "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'function'"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool(parameters="x")]}, "tools[0].function.parameters", "dictionary"),
        ({"tool_choice": "required"}, "tool_choice", "in 'tools'"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tools": [tool()], "tool_choice": tool("other")}, "tool_choice", "in 'tools'"),
        ({"tools": [tool()], "response_format": {"type": "json_schema", "json_schema":
         {"name": "a", "schema": {"type": "foo"}}}}, "response_format", "foo"),
        ({"tools": [tool(parameters={"type": "foo"})], "tool_choice": "required"}, "tools",
         "foo"),
        ({"messages": [CALLED]}, "messages[0].tool_calls[0].function.arguments", "JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(live, change, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as found:
        chat(live[1], **change)
    assert found.value.param == param


def test_a_model_whose_template_knows_no_tools_calls_them_if_it_must():
    pytest.importorskip("llguidance", reason="the extra structured is not installed")
    llm = byte_llm(positions=2048)
    llm.tokenizer.chat_template = CHAT_TEMPLATE
    engine, prompts = dense_engine(llm), []
    submit = engine.submit
    engine.submit = lambda ids, *args, **more: prompts.append(ids) or submit(ids, *args, **more)
    ask = {"tools": [tool(), tool("b")], "max_tokens": 500}
    with served(engine, llm.tokenizer) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="writes no tool calls"):
            chat(client, **ask)
        named = {"type": "function", "function": {"name": "weather"}}
        (first,) = chat(client, **ask, tool_choice=named).choices
        (call,) = first.message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
        told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        messages = [{"role": "system", "content": "Be brief."}, first.message, told]
        assert chat(client, **ask, messages=messages, tool_choice="required").choices
        text = llm.tokenizer.decode(prompts[-1])
        for part in ("system: Be brief.", '"name": "b"', "user: weather returned: sunny"):
            assert part in text
        assert chat(client, messages=messages).choices  # a history alone


def test_without_the_library_free_calls_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = tool_tokenizer("tagged")
    engine = FakeEngine(tokenizer, written("tagged", ROME))
    engine.max_seq_len_tokens = 4096
    with served(engine, tokenizer) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"rap-env\[structured\]"):
            chat(client, tools=[tool()], tool_choice="required")
        assert chat(client, tools=[tool()], max_tokens=99).choices[0].message.tool_calls

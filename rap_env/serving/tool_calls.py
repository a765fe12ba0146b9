"""Tool calls in the text of a model: the form its chat template writes, a grammar and a parser."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rap_env.errors import UnsupportedModelError
from rap_env.runtime.structured_output import WHITESPACE, closed_schema
from rap_env.serving.http import ApiError

_ID = "example01"  # Mistral's templates accept only ids of nine characters
_PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
_FUNCTION = {"name": "example", "description": "An example", "parameters": _PARAMETERS}
_CALL = {"id": _ID, "type": "function", "function": {"name": "example", "arguments": {"x": 1}}}
_USER = {"role": "user", "content": "hi"}
_ANSWER = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": "example", "content": "1", "tool_call_id": _ID}
_WRITTEN_CALL = re.compile(
    r'(?P<marker>\S*?)(?P<bracket>\s*\[?\s*)\{[^{}]*"(?P<key>\w+)": \{"x": 1\}[^{}]*\}'
    r"(?P<closing>(?:\s*\])?(?:\s*<\|?/\w{2,}\|?>)?)"  # "</s>" ends an answer
)
_ANY_TEXT, _NO_JSON = r"/(.|\n)*/", r"/\s*([^\s{\[](.|\n)*)?/"


@dataclass(frozen=True)
class CallForm:
    """How a model writes tool calls: JSON objects with a name and arguments, and text around.

    Attributes:
        marker: What calls begin with; empty if an answer that calls is JSON alone, and one call.
        bracket: Text between the marker and a call: white space, or also the start of a list.
        closing: Text after calls.
        key: Name of the arguments.
        marker_id: The special token that the marker is, if it is one.
    """

    marker: str
    bracket: str
    closing: str
    key: str
    marker_id: int | None

    @classmethod
    def of_template(cls, render: Callable[..., str], tokenizer: Any) -> Self:
        """Find the form by rendering an example of a call.

        Args:
            render: Writes messages and tools in the template, up to where an answer begins;
                raises an `ApiError` if the template rejects them.
            tokenizer: The model's tokenizer.

        Raises:
            UnsupportedModelError: The template has no place for tools, or another form.
        """
        tools = [{"type": "function", "function": _FUNCTION}]
        try:
            # A prompt that opens a thought is no prefix; the call is on a line of its own then.
            written = render([_USER, _ANSWER, _RESULT], tools).removeprefix(render([_USER], tools))
        except ApiError:
            written = ""
        if (call := _WRITTEN_CALL.search(written)) is None:
            raise UnsupportedModelError(
                "The model's chat template writes no tool calls, or none as JSON objects with name "
                "and arguments. Leave tools out, or serve a model that was trained to call them."
            )
        added = tokenizer.added_tokens_decoder.items()
        special_ids = {token.content: number for number, token in added if token.special}
        return cls(**call.groupdict(), marker_id=special_ids.get(call["marker"]))

    def grammar(
        self,
        schemas: Mapping[str, Any],
        *,
        required: bool,
        single: bool,
        answer: Any = None,
        lenient: bool = False,
    ) -> str:
        """A grammar of answers, in Lark's form.

        Args:
            schemas: The JSON schema of the arguments of each function.
            required: Whether an answer must call; otherwise it may be, or begin with, any text.
            single: Whether it makes at most one call.
            answer: The JSON schema of an answer that does not call; None for any text.
            lenient: Whether unknown keywords of schemas are left out; else they are errors.
        """
        options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
        json_object = {"type": "object", "x-guidance": options}
        answer = None if answer is None else json.dumps(json_object | closed_schema(answer))
        begins = not required and answer is None  # with text
        marker, bracket, closing = map(_literal, (self.marker, self.bracket, self.closing))
        marker = marker if self.marker_id is None else f"<[{self.marker_id}]>"
        again = '", "' if "[" in self.bracket else f'{closing} "\\n" {marker} {bracket}'
        more = f"({again} call)*" if marker and not single else ""
        lazy = "[lazy]" if begins and self.marker_id is None else ""
        rules = [
            "%llguidance {}",
            f"start: calls{'' if required else ' | answer'}",
            f"answer: {'TEXT' if answer is None else f'%json {answer}'}",
            f"calls: begin {bracket} call {more} {closing}",
            f"begin{lazy}: {'TEXT' if begins else ''} {marker}" if marker else "begin:",
            f"TEXT: {_ANY_TEXT if marker else _NO_JSON}",
            f"call: {' | '.join(f'call{number}' for number in range(len(schemas)))}",
        ]
        for number, (name, schema) in enumerate(schemas.items()):
            arguments = {"type": "object"} | closed_schema(schema)
            properties = {"name": {"const": name}, self.key: arguments}
            call = json_object | {"properties": properties, "required": [*properties]}
            rules.append(
                f"call{number}: %json {json.dumps(call | {'additionalProperties': False})}"
            )
        return "\n".join(rules)


GENERIC_FORM = CallForm("", "", "", "arguments", None)
"""How models call tools whose chat template writes no calls: an answer is one JSON object."""


def generic_turns(
    turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Turns in which tools, calls and results are texts, for a template that knows none.

    Args:
        turns: The messages.
        tools: The tools that the answer may use, which the first turn says.
    """
    written = []
    for turn in turns:
        if calls := turn.get("tool_calls"):
            texts = [json.dumps(call["function"]) for call in calls]
            turn = {
                "role": "assistant",
                "content": "\n".join(filter(None, [turn["content"], *texts])),
            }
        elif turn["role"] == "tool":
            turn = {"role": "user", "content": f"{turn['name']} returned: {turn['content']}"}
        written.append(turn)
    if tools:
        functions = "\n".join(json.dumps(tool["function"]) for tool in tools)
        text = (
            "Answer with a call of one of these functions, as a JSON object with its name and "
            f'arguments: {{"name": ..., "arguments": {{...}}}}.\n{functions}'
        )
        if written[0]["role"] == "system":
            text = f"{written.pop(0)['content']}\n\n{text}"
        written.insert(0, {"role": "system", "content": text})
    return written


def _literal(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text) if text else ""


class ToolCallParser:
    """Splits the text of an answer into content and tool calls while it is generated.

    From where calls may begin, it keeps all text until the answer ends. A call is a JSON object
    with the name of a known function and arguments, in any order; what is no call is content.

    Args:
        form: How the model writes calls.
        names: The functions.
        single: Whether only the first call counts.
    """

    def __init__(self, form: CallForm, names: Sequence[str], *, single: bool = False) -> None:
        self.form = form
        self._names = tuple(names)
        self._most = 1 if single else None
        self._kept = ""
        self._may_call = True

    def add(self, piece: str, *, ended: bool) -> tuple[str, list[dict[str, Any]]]:
        """Add text, the last one if `ended`; return new content, and at the end the calls.

        The calls are in the format of the API.
        """
        self._kept += piece
        text, marker = self._kept, self.form.marker
        if marker:
            before = text.partition(marker)[0]
            end = len(before[: len(before) - partial_match(before, [marker])].rstrip())
        else:
            self._may_call = self._may_call and text.lstrip()[:1] in ("", "{", "[")
            end = 0 if self._may_call else len(text)
        self._kept = text[end:]
        rest, calls = self._split() if ended else ("", [])
        return text[:end] + rest, calls

    def _split(self) -> tuple[str, list[dict[str, Any]]]:
        """The content and the calls of the text that was kept."""
        text = content = self._kept
        calls: list[dict[str, Any]] = []
        place = 0
        while (begin := text.find("{", place)) >= 0:
            try:
                value, place = json.JSONDecoder().raw_decode(text, begin)
            except (ValueError, RecursionError):
                value, place = {}, begin + 1
            arguments = value.get("arguments", value.get("parameters"))
            if value.get("name") in self._names and isinstance(arguments, dict):
                function = {"name": value["name"], "arguments": json.dumps(arguments)}
                calls.append({"id": uuid.uuid4().hex[:9], "type": "function", "function": function})
                content = content.replace(text[begin:place], "")
        if calls:
            for around in (self.form.marker, self.form.closing.strip("\n ]")):
                content = content.replace(around, "")
            content = ("\n" + content.lstrip("\n ,;[]")).rstrip()
        return content, calls[: self._most]


def partial_match(text: str, strings: Sequence[str]) -> int:
    """Length of the longest suffix of a text that is a prefix, not all, of one of some strings."""
    longest = min(len(text), max((len(string) - 1 for string in strings), default=0))
    for length in range(longest, 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0

"""The tools of a chat request: which functions the model may or must call, and in which form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rap_env.runtime.structured_output import WHITESPACE
from rap_env.serving.errors import invalid, shown
from rap_env.serving.schemas import ChatCompletionRequest, ToolSpec
from rap_env.serving.tool_calls import BARE_JSON, MISTRAL, ToolCallParser, ToolFormat, tool_format


@dataclass(frozen=True)
class Tools:
    """The functions that the answers to a request may call.

    Attributes:
        form: How the model writes calls.
        specs: The functions.
        forced: Whether an answer has to be a call.
        single: Whether an answer has one call at most.
        keep_special: Whether the model writes calls with special tokens.
    """

    form: ToolFormat
    specs: tuple[ToolSpec, ...]
    forced: bool
    single: bool
    keep_special: bool

    def parser(self) -> ToolCallParser:
        """A parser for one answer."""
        names = [spec.function.name for spec in self.specs]
        return ToolCallParser(self.form, names, single=self.single)

    def grammar(self, tokenizer: Any) -> str:
        """The grammar of a forced answer, in the library's form of Lark: calls and nothing else.

        Arguments follow the functions' parameters. Keywords of JSON Schema that the library does
        not know are ignored, unless a function is strict.
        """
        calls = {"anyOf": [self._call(n, spec) for n, spec in enumerate(self.specs)]}
        strict = any(spec.function.strict for spec in self.specs)
        options = {"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}}
        if self.form == BARE_JSON:
            return f"start: %json {json.dumps(calls | options)}"
        begin = _literal(self.form.begin, tokenizer)
        if self.form == MISTRAL:
            most = {"maxItems": 1} if self.single else {}
            listed = {"type": "array", "items": calls, "minItems": 1, **most}
            listed = _moved(listed, "#/items")
            return f"start: {begin} %json {json.dumps(listed | options)}"
        end = _literal(self.form.end, tokenizer)
        more = "" if self.single else ' ("\\n" call)*'
        return (
            f'start: call{more}\ncall: {begin} "\\n" object "\\n" {end}\n'
            f"object: %json {json.dumps(calls | options)}"
        )

    def _call(self, number: int, spec: ToolSpec) -> dict[str, Any]:
        """The schema of a call of a function, entry `number` of a list."""
        place = f"#/anyOf/{number}/properties/{self.form.arguments}"
        arguments = _moved(spec.function.parameters or {"type": "object"}, place)
        properties = {"name": {"const": spec.function.name}, self.form.arguments: arguments}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }


def tools_of(body: ChatCompletionRequest, tokenizer: Any) -> Tools | None:
    """The tools of a request that its answers may call; None for none.

    Raises:
        ApiError: A field is invalid, or the model's chat template has no tools or writes their
            calls in an unknown form (400).
    """
    specs, choice = tuple(body.tools or ()), body.tool_choice
    names = [spec.function.name for spec in specs]
    if len(set(names)) < len(names):
        raise invalid("Two functions of 'tools' have the same name.", "tools")
    named = _named(choice)
    if named is not None and named not in names:
        raise invalid(
            f"'tool_choice' names the unknown function {shown(repr(named))}.", "tool_choice"
        )
    if not specs and choice == "required":
        raise invalid("'tool_choice' is 'required', but there are no 'tools'.", "tool_choice")
    if not specs or choice == "none":
        return None
    if body.response_format not in (None, {"type": "text"}) or body.structured_outputs:
        raise invalid(
            "'tools' cannot be combined with 'response_format' or 'structured_outputs'; set "
            "'tool_choice' to 'none'.",
            "tools",
        )
    form = tool_format(checked_template(tokenizer, "tools"))
    if form is None:
        raise invalid(
            "This server does not read the form in which this model's chat template writes calls.",
            "tools",
            "unsupported_parameter",
        )
    if named is not None:
        specs = tuple(spec for spec in specs if spec.function.name == named)
    special = getattr(tokenizer, "all_special_tokens", ())
    return Tools(
        form,
        specs,
        forced=named is not None or choice == "required",
        single=named is not None or body.parallel_tool_calls is False,
        keep_special=form.begin in special or form == BARE_JSON,
    )


def checked_template(tokenizer: Any, field: str) -> str:
    """The chat template for tools; an `ApiError` (400) that names a field if it has none."""
    try:
        template = tokenizer.get_chat_template(None, tools=[])
    except ValueError:
        template = ""
    if re.search(r"\btools\b", template) is None:
        raise invalid("This model's chat template has no tools.", field, "unsupported_parameter")
    return str(template)


def _named(choice: Any) -> str | None:
    """The function that a `tool_choice` names, if it does."""
    if choice in (None, "none", "auto", "required"):
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise invalid(
        "'tool_choice' must be 'none', 'auto', 'required' or {'type': 'function', 'function': "
        f"{{'name': ...}}}}, not {shown(repr(choice))}.",
        "tool_choice",
    )


def _literal(text: str, tokenizer: Any) -> str:
    """A text in a Lark grammar: a special token by its id, since letters do not write it."""
    if text in getattr(tokenizer, "all_special_tokens", ()):
        return f"<[{tokenizer.convert_tokens_to_ids(text)}]>"
    return json.dumps(text)


def _moved(schema: Any, place: str) -> Any:
    """A schema with its references, for use at a place inside another one."""
    if isinstance(schema, list):
        return [_moved(entry, place) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }

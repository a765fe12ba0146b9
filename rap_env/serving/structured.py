"""What the answers to a request have to follow: its `response_format` or `structured_outputs`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rap_env.errors import InvalidGrammarError, MissingDependencyError, UnsupportedModelError
from rap_env.runtime.structured_output import GrammarCompiler, GrammarKind, GrammarMatcher
from rap_env.serving.errors import invalid, shown
from rap_env.serving.schemas import BaseCompletionRequest

_ANY_OBJECT = '{"type": "object"}'
_FORMATS = ("text", "json_object", "json_schema")
_OPTIONS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def constraint_of(
    body: BaseCompletionRequest, compiler: GrammarCompiler
) -> Callable[[], GrammarMatcher] | None:
    """Compile what the answers have to follow, None for free text.

    Raises:
        ApiError: A field is invalid, its grammar cannot be compiled, or this server lacks what it
            takes (400).
    """
    by_field = {
        "response_format": _of_format(body.response_format),
        "structured_outputs": _of_options(body.structured_outputs),
    }
    given = {field: grammar for field, grammar in by_field.items() if grammar is not None}
    if len(given) > 1:
        raise invalid(
            "Only one of 'response_format' and 'structured_outputs' is allowed.",
            "structured_outputs",
        )
    for field, (kind, text) in given.items():
        return _compiled(compiler, kind, text, field)
    return None


def _compiled(
    compiler: GrammarCompiler, kind: GrammarKind, text: str, field: str
) -> Callable[[], GrammarMatcher]:
    """Compile a grammar that a field of the request asks for; errors are `ApiError` (400)."""
    try:
        return compiler.compile(kind, text)
    except InvalidGrammarError as error:
        raise invalid(f"Invalid value for '{field}': {shown(str(error), 400)}", field) from None
    except (MissingDependencyError, UnsupportedModelError) as error:
        raise invalid(
            f"'{field}' is not supported with this server: {shown(str(error), 400)}",
            field,
            "unsupported_parameter",
        ) from None


def _of_format(given: dict[str, Any] | None) -> tuple[GrammarKind, str] | None:
    """The grammar of a `response_format`, as in OpenAI's API."""
    if given is None or given.get("type") == "text":
        return None
    kind = given.get("type")
    if kind == "json_object":
        return "json_schema", _ANY_OBJECT
    if kind != "json_schema":
        raise invalid(
            f"Invalid value for 'response_format.type': {shown(repr(kind))}; supported are "
            f"{', '.join(map(repr, _FORMATS))}.",
            "response_format.type",
        )
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise invalid(
            "'response_format.json_schema.schema' must be a JSON schema, an object.",
            "response_format.json_schema.schema",
            "invalid_type",
        )
    return "json_schema", json.dumps(schema)


def _of_options(given: dict[str, Any] | None) -> tuple[GrammarKind, str] | None:
    """The grammar of `structured_outputs`, as in vLLM's server."""
    options = {name: value for name, value in (given or {}).items() if value not in (None, False)}
    if not options:
        return None
    (name, value), *more = options.items()
    if more or name not in _OPTIONS:
        raise invalid(
            f"'structured_outputs' must have exactly one of {', '.join(map(repr, _OPTIONS))}, "
            f"not {shown(', '.join(map(repr, options)))}.",
            "structured_outputs",
        )
    if name == "json_object":
        return "json_schema", _ANY_OBJECT
    if name == "json" and isinstance(value, dict):
        return "json_schema", json.dumps(value)
    if name == "choice":
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return "choice", json.dumps(value)
    elif isinstance(value, str):
        return _OPTIONS[name], value
    expected = {"json": "a JSON schema", "choice": "a list of strings"}.get(name, "a string")
    raise invalid(
        f"'structured_outputs.{name}' must be {expected}, not {shown(repr(value))}.",
        f"structured_outputs.{name}",
        "invalid_type",
    )

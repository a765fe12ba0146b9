"""Messages of a chat as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

from rap_env.serving.errors import invalid, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Roles of messages, and their names in chat templates."""
_UNSUPPORTED_FIELDS = ("function_call", "audio")


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and convert them: known roles, text, and tool calls with parsed arguments.

    Raises:
        ApiError: A message is invalid (400).
    """
    return [_turn(f"messages[{number}]", message) for number, message in enumerate(messages)]


def uses_tools(messages: list[dict[str, Any]]) -> bool:
    """Whether any of the converted messages calls a tool or has its result."""
    return any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages)


def _turn(where: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {shown(repr(role))}; supported are "
            f"{', '.join(map(repr, ROLES))}.",
            f"{where}.role",
        )
    calls = message.get("tool_calls")
    for name in (*_UNSUPPORTED_FIELDS, *(("tool_calls",) if role != "assistant" else ())):
        if message.get(name):
            raise invalid(f"'{where}.{name}' is not supported in a message of '{role}'.", where)
    content = message.get("content")
    turn: dict[str, Any] = {"role": ROLES[role]}
    turn["content"] = "" if calls and content is None else _content(content, where)
    if calls:
        turn["tool_calls"] = _calls(calls, where)
    if role == "tool":
        call = message.get("tool_call_id")
        if not isinstance(call, str):
            raise invalid(
                f"'{where}.tool_call_id' must be the id of a tool call, not {shown(repr(call))}.",
                f"{where}.tool_call_id",
                "invalid_type",
            )
        turn["tool_call_id"] = call
        if isinstance(name := message.get("name"), str):
            turn["name"] = name
    return turn


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise invalid(
        f"'{where}.content' must be a string or a list of parts of type 'text'.",
        f"{where}.content",
        "invalid_type",
    )


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as values, not as text: templates write the JSON."""
    found = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        try:
            function = call["function"]
            name, arguments = function["name"], json.loads(function["arguments"])
            if not (isinstance(name, str) and isinstance(arguments, dict)):
                raise TypeError
        except (LookupError, TypeError, ValueError, RecursionError):
            place = f"{where}.tool_calls[{number}]"
            raise invalid(
                f"'{place}' must be a call of a function with its 'name' and its 'arguments', an "
                "object as JSON text.",
                place,
            ) from None
        named = {"name": name, "arguments": arguments}
        found.append({"id": str(call.get("id", "")), "type": "function", "function": named})
    return found

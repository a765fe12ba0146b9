"""Messages of a chat as chat templates expect them."""

from __future__ import annotations

from typing import Any

from rap_env.serving.errors import invalid, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and their names in chat templates."""
_UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "audio")


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Check messages and convert them: known roles and text.

    Raises:
        ApiError: A message is invalid (400).
    """
    return [_turn(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _turn(where: str, message: dict[str, Any]) -> dict[str, str]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {shown(repr(role))}; supported are "
            f"{', '.join(map(repr, ROLES))}.",
            f"{where}.role",
        )
    for name in _UNSUPPORTED_FIELDS:
        if message.get(name):
            raise invalid(f"'{where}.{name}' is not supported in a message of '{role}'.", where)
    return {"role": ROLES[role], "content": _content(message.get("content"), where)}


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

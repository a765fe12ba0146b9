"""From messages or prompts to token ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from rap_env.serving.errors import invalid, shown
from rap_env.serving.schemas import ChatRequest, CompletionRequest

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and what the chat template calls them."""
_OTHER_MESSAGE_FIELDS = ("tool_calls", "function_call", "audio")


class PromptReader:
    """Makes token ids of what a request asks.

    Args:
        tokenizer: A tokenizer of transformers.
        max_messages: Most messages of a chat.
        max_prompts: Most prompts of a completion.
    """

    def __init__(self, tokenizer: Any, *, max_messages: int, max_prompts: int) -> None:
        self._tokenizer = tokenizer
        self._max_messages = max_messages
        self._max_prompts = max_prompts
        self._lock = threading.Lock()  # a tokenizer's settings are not safe between threads

    def read(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt; a chat is one.

        Raises:
            ApiError: There is no chat template, or messages or prompts are wrong (400).
        """
        if isinstance(asked, ChatRequest):
            return [self._chat(asked.messages)]
        return self._prompts(asked.prompt)

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise invalid(
                "This model has no chat template; use /v1/completions instead.",
                "messages",
                "no_chat_template",
            )
        if not messages:
            raise invalid("'messages' must have at least one message.", "messages")
        if len(messages) > self._max_messages:
            raise invalid(
                f"'messages' may have at most {self._max_messages} messages, not {len(messages)}.",
                "messages",
            )
        turns = [_turn(number, message) for number, message in enumerate(messages)]
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
                # The template writes the special tokens itself.
                return self._encode(text, add_special_tokens=False)
        except ImportError:
            raise
        except Exception as error:  # templates are programs, and refuse in many ways
            raise invalid(
                f"The model's chat template refuses these messages: {shown(str(error))}.",
                "messages",
            ) from None

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if prompt is None:
            prompt = ""  # as in the API: from the start of a text
        if isinstance(prompt, str) or _is_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise invalid(
                "'prompt' must be a string, a list of strings, a list of token ids, or a list of "
                "such lists.",
                "prompt",
                "invalid_type",
            )
        if len(prompt) > self._max_prompts:
            raise invalid(
                f"'prompt' may have at most {self._max_prompts} entries, not {len(prompt)}.",
                "prompt",
            )
        return [self._one(entry) for entry in prompt]

    def _one(self, entry: Any) -> list[int]:
        if isinstance(entry, str):
            with self._lock:
                ids = self._encode(entry, add_special_tokens=True)
        elif _is_ids(entry):
            ids = list(entry)
        else:
            raise invalid(
                f"An entry of 'prompt' must be a string or a list of token ids, "
                f"not {shown(repr(entry))}.",
                "prompt",
                "invalid_type",
            )
        start = getattr(self._tokenizer, "bos_token_id", None)
        if ids:
            return ids
        if start is None:
            raise invalid("The prompt has no tokens, and the model needs one.", "prompt")
        return [int(start)]  # an empty text still has its start

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: Sequence[int] = self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )
        return list(ids)


def _is_ids(value: Any) -> bool:
    """Whether it is a list of token ids, and not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    )


def _turn(number: int, message: dict[str, Any]) -> dict[str, str]:
    """One message as templates expect it.

    Raises:
        ApiError: Its role or content is not text (400).
    """
    where = f"messages[{number}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {shown(repr(role))}; supported are "
            f"{', '.join(map(repr, ROLES))}.",
            f"{where}.role",
        )
    for name in _OTHER_MESSAGE_FIELDS:
        if message.get(name):
            raise invalid(f"'{where}.{name}' is not supported: messages are text.", where)
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

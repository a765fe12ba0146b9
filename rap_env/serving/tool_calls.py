"""Tool calls in the text of answers: the forms that chat templates teach models, and a parser."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

PYTHON_TAG = "<|python_tag|>"
"""What Llama 3.1 may write before a call."""
_SEPARATORS = re.compile(r"[\s;,]*")


class ToolCall(NamedTuple):
    """A call of a function, with its arguments as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls: as JSON, an object for each call or a list of them.

    Attributes:
        begin: Text before a call; empty if an answer that begins with a brace is a call.
        end: Text after a call; empty if that is the end of the answer.
        arguments: Name of the arguments in a call's object; both names are read.
    """

    begin: str
    end: str
    arguments: str = "arguments"

    def new_id(self) -> str:
        """An id for a call; Mistral's templates take 9 letters and digits alone."""
        if self == MISTRAL:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


TAGS = ToolFormat("<tool_call>", "</tool_call>")
"""Hermes, Qwen 2.5 and 3, SmolLM 2 and 3."""
MISTRAL = ToolFormat("[TOOL_CALLS]", "")
"""Mistral, up to version 7 of its tokenizer."""
BARE_JSON = ToolFormat("", "", "parameters")
"""Llama 3.1 and later."""

_OTHER_FORMS = ("<function=", "<arg_key>", "[ARGS]")


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, None if it is none of the known ones."""
    if any(form in template for form in _OTHER_FORMS):
        return None
    for known in (TAGS, MISTRAL):
        if known.begin in template:
            return known
    return BARE_JSON if re.search(r'\{\\?"name\\?"\s*:', template) else None


class ToolCallParser:
    """Separates the tool calls of an answer from its other text, as it grows.

    What may be a call is held back until it is complete. What turns out to be none, or a call of an
    unknown function, is text.

    Args:
        form: How calls are written.
        names: The known functions.
        single: Whether the answer ends with its first call.

    Attributes:
        calls: Number of calls found.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, single: bool = False) -> None:
        self._form = form
        self._names = frozenset(names)
        self._single = single
        self._held = ""
        self._inside = False  # the held text begins with a call's first characters
        self._begun = False  # text was returned
        self.calls = 0

    @property
    def complete(self) -> bool:
        """Whether the answer has all the calls that it may have."""
        return self._single and self.calls > 0

    def add(self, piece: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Add text; return the text that is no part of a call, and the calls that are complete."""
        self._held += piece
        text, calls = "", list[ToolCall]()
        while not self.complete:
            if not self._inside:
                text += self._before_call()
                if not self._inside:
                    break
            body_end = self._held.find(self._form.end) if self._form.end else -1
            if body_end < 0:
                break
            taken = body_end + len(self._form.end)
            call, self._held, self._inside = self._held[:taken], self._held[taken:], False
            found = self._parse(call)
            calls += found
            text += "" if found else call
        self._begun |= bool(text)
        return text, tuple(calls)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """As `add`, of what was held back; call it at the end of the answer."""
        held, self._held = self._held, ""
        if self.complete:
            return "", ()
        found = self._parse(held) if self._inside else []
        if found or (self.calls and not held.strip()):
            return "", tuple(found)
        return held, ()

    def _before_call(self) -> str:
        """Take the text before the next call from the held text, and note whether one begins."""
        begin, held = self._form.begin, self._held
        if begin:
            place = held.find(begin)
            self._inside = place >= 0
            text = held[: place if self._inside else len(held) - _overlap(held, begin)]
            text = text.rstrip()  # spaces before a call are no text
            self._held = held[len(text) :]
            return text
        start = held.lstrip()
        self._inside = not self._begun and start.startswith(("{", PYTHON_TAG))
        if self._inside or (not self._begun and PYTHON_TAG.startswith(start)):
            return ""
        self._held = ""
        return held

    def _parse(self, written: str) -> list[ToolCall]:
        """The calls in a text from `begin` to `end`; none if it is anything else."""
        begin = self._form.begin or PYTHON_TAG
        body = written.strip().removeprefix(begin).removesuffix(self._form.end)
        calls = []
        try:
            for entry in _values(body):
                name = entry["name"]
                arguments = entry["arguments"] if "arguments" in entry else entry["parameters"]
                if isinstance(arguments, str):
                    arguments = json.loads(arguments)
                if name not in self._names or not isinstance(arguments, dict):
                    return []
                written_arguments = json.dumps(arguments, ensure_ascii=False)
                calls.append(ToolCall(self._form.new_id(), name, written_arguments))
        except (ValueError, LookupError, TypeError, RecursionError):
            return []
        calls = calls[:1] if self._single else calls
        self.calls += len(calls)
        return calls


def _values(text: str) -> Iterator[Any]:
    """The JSON values in a text, and the entries of those that are lists."""
    decoder = json.JSONDecoder()
    place = _end_of_separators(text, 0)
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        yield from value if isinstance(value, list) else [value]
        place = _end_of_separators(text, place)


def _end_of_separators(text: str, place: int) -> int:
    found = _SEPARATORS.match(text, place)
    return place if found is None else found.end()


def _overlap(text: str, begin: str) -> int:
    """Length of the longest end of `text` that is a beginning of `begin`."""
    longest = min(len(text), len(begin) - 1)
    return next((n for n in range(longest, 0, -1) if begin.startswith(text[-n:])), 0)

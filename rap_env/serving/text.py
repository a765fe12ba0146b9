"""From token ids to text, piece by piece: whole characters only, and nothing after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character (yet)."""
_MOST_UNFINISHED = 3
"""Bytes of a character in UTF-8, less the last one: so many may wait for it."""
_MOST_TOKENS = 64
"""Tokens after which bytes that never became a character are given out as they are."""


class Detokenizer:
    """Decodes a growing sequence; what it has given out never changes.

    The text of a token depends on what is before it (a leading space is dropped at the start
    of a text) and, where a character has several bytes, on what comes after it. So each step
    decodes a short window that begins with tokens whose text is out already, and holds back
    what may still change. The work of a step does not grow with the sequence.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window whose text is out
        self._given = 0  # characters of the window's text that are out

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often that of the token alone."""
        self._window.append(token_id)
        text = self._decode(self._window)
        waiting = len(text) - len(text.rstrip(UNFINISHED))
        waiting = min(waiting, _MOST_UNFINISHED)
        if len(self._window) - self._context > _MOST_TOKENS:
            waiting = 0
        certain = len(text) - waiting
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not waiting:
            self._move_on()
        return piece

    def finish(self) -> str:
        """What was held back, once there are no more tokens."""
        text = self._decode(self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move_on(self) -> None:
        recent = self._window[self._context :]
        if text := self._decode(recent):  # a window without text would be no context
            self._window, self._given = recent, len(text)
        self._context = len(self._window)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return plain_text(self._tokenizer, token_ids)


def plain_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of some tokens, without special ones and not prettified."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class StopStrings:
    """Ends a text before the first of some strings, wherever pieces begin and end.

    Args:
        strings: The strings, none of them empty.

    Attributes:
        found: Whether one of them has come; nothing comes after it.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is certain to come before any of the strings."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for start in map(text.find, self._strings) if start >= 0]
        if starts:
            self.found = True
            self._held = ""
            return text[: min(starts)]
        keep = self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the strings begins."""
        longest = min(len(text), max((len(string) - 1 for string in self._strings), default=0))
        for length in range(longest, 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0

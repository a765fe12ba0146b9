"""Incremental detokenization: whole characters only, and no text after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are not a whole character (yet)."""
_MAX_UNFINISHED = 3
"""Bytes of a UTF-8 character without its last one: so many may wait for it."""
_MAX_TOKENS = 64
"""Tokens after which bytes that never became a character are returned as they are."""


class Detokenizer:
    """Decodes a growing sequence of tokens; text that it has returned never changes.

    The text of a token depends on the tokens before it (a leading space is dropped at the start
    of a text) and, if a character has several bytes, on the tokens after it. So each step decodes
    a short window that begins with tokens whose text was already returned, and holds back text
    that may still change. The work per step does not grow with the sequence.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window whose text was returned
        self._given = 0  # characters of the window's text that were returned

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is final now, often that of the token alone."""
        self._window.append(token_id)
        text = plain_text(self._tokenizer, self._window)
        waiting = min(len(text) - len(text.rstrip(UNFINISHED)), _MAX_UNFINISHED)
        if len(self._window) - self._context > _MAX_TOKENS:
            waiting = 0
        certain = len(text) - waiting
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not waiting:
            self._move_on()
        return piece

    def finish(self) -> str:
        """Return the text that was held back; call it after the last token."""
        text = plain_text(self._tokenizer, self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move_on(self) -> None:
        recent = self._window[self._context :]
        if text := plain_text(self._tokenizer, recent):  # a window without text would be no context
            self._window, self._given = recent, len(text)
        self._context = len(self._window)


def plain_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode tokens, without special tokens and without cleaning up spaces."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class StopStrings:
    """Truncates streamed text before the first of several stop strings, none of them empty.

    After one has `matched`, no text is returned.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._waiting = ""
        self.matched = False

    def add(self, piece: str) -> str:
        """Add text and return the part that cannot belong to a stop string."""
        if self.matched:
            return ""
        text = self._waiting + piece
        starts = [start for start in map(text.find, self._strings) if start >= 0]
        if starts:
            self.matched = True
            self._waiting = ""
            return text[: min(starts)]
        keep = self._partial_match(text)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was held back; call it after the last text."""
        text, self._waiting = self._waiting, ""
        return text

    def _partial_match(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(len(text), max((len(string) - 1 for string in self._strings), default=0))
        for length in range(longest, 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0

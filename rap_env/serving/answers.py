"""The JSON of answers, whole and in chunks, as the API writes it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rap_env.serving.generation import Logprob, Piece

DONE = b"data: [DONE]\n\n"
"""The last line of a stream."""


@dataclass
class _Whole:
    """An answer as far as it has come."""

    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None


class AnswerWriter:
    """Writes one request's answers.

    Args:
        chat: Whether it is a chat completion.
        model: What the client calls the model.
        fingerprint: The system fingerprint.
        logprobs: Whether log probabilities are written.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        fingerprint: str,
        logprobs: bool = False,
        include_usage: bool = False,
    ) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._lengths: dict[int, int] = {}  # characters written of each answer
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, pieces: Iterable[Piece], size: int, usage: Mapping[str, int]) -> dict[str, Any]:
        """The response without streaming.

        Args:
            pieces: All pieces of all answers.
            size: Number of answers.
            usage: Numbers of tokens.
        """
        answers = [_Whole() for _ in range(size)]
        for piece in pieces:
            answer = answers[piece.index]
            answer.text += piece.text
            answer.logprobs += piece.logprobs
            answer.finish_reason = piece.finish_reason or answer.finish_reason
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._whole_choice(i, answer) for i, answer in enumerate(answers)],
            "usage": dict(usage),
        }

    def _whole_choice(self, index: int, answer: _Whole) -> dict[str, Any]:
        common = {
            "index": index,
            "finish_reason": answer.finish_reason,
            "logprobs": self._logprobs_json(index, answer.logprobs),
        }
        if self._chat:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            return {**common, "message": message}
        return {**common, "text": answer.text}

    def opening(self, size: int) -> list[bytes]:
        """What a stream begins with: in a chat, who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(i, {"delta": delta}, [], None) for i in range(size)]

    def chunks(self, piece: Piece) -> list[bytes]:
        """The events of a stream for one piece; its end is an event of its own in a chat."""
        if not self._chat:
            body = {"text": piece.text}
            return [self._chunk(piece.index, body, piece.logprobs, piece.finish_reason)]
        events = []
        if piece.text or piece.logprobs:
            delta = {"content": piece.text}
            events.append(self._chunk(piece.index, {"delta": delta}, piece.logprobs, None))
        if piece.finish_reason:
            events.append(self._chunk(piece.index, {"delta": {}}, [], piece.finish_reason))
        return events

    def closing(self, usage: Mapping[str, int]) -> list[bytes]:
        """What a stream ends with."""
        if not self._include_usage:
            return [DONE]
        return [event({**self._stream_head(), "choices": [], "usage": dict(usage)}), DONE]

    def _chunk(
        self,
        index: int,
        body: Mapping[str, Any],
        logprobs: Sequence[Logprob],
        finish_reason: str | None,
    ) -> bytes:
        choice = {
            "index": index,
            **body,
            "logprobs": self._logprobs_json(index, logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = {**self._stream_head(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _stream_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}

    def _logprobs_json(self, index: int, found: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            return {"content": [_chat_logprob(entry) for entry in found], "refusal": None}
        offsets = []
        for entry in found:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(entry.token)
        return {
            "tokens": [entry.token for entry in found],
            "token_logprobs": [entry.logprob for entry in found],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def _chat_logprob(entry: Logprob) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in entry.token
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": list(entry.token.encode()) if whole else None,
        "top_logprobs": [],
    }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The numbers of tokens, as the API writes them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event; its JSON is ASCII, so that no reader finds line breaks in it."""
    return f"data: {json.dumps(content)}\n\n".encode()

"""Responses of the API: whole as JSON, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rap_env.serving.generation import AnswerPlans, Generation, OutputDelta, TokenLogprob
from rap_env.serving.http import ApiError
from rap_env.serving.prompts import GenerationRequest

DONE = b"data: [DONE]\n\n"
"""Last event of a stream."""


class AnswerWriter(Protocol):
    """Writes the response to one request."""

    def whole(self, deltas: Sequence[OutputDelta], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Body of the response without streaming, from all deltas of all answers."""

    def opening(self) -> list[bytes]:
        """First events of a stream."""

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        """Events of a stream for one delta."""

    def closing(self, usage: Mapping[str, Any]) -> list[bytes]:
        """Last events of a stream."""


class ResponseWriter:
    """Writes the response to one request, with what `plans` reports at the time of writing."""

    def __init__(self, request: GenerationRequest, *, model: str, plans: AnswerPlans) -> None:
        self._request = request
        self._plans = plans
        self._unfinished = request.size
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, deltas: Sequence[OutputDelta], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Body of the response without streaming, from all deltas of all answers."""
        by_answer: list[list[OutputDelta]] = [[] for _ in range(self._request.size)]
        for delta in deltas:
            by_answer[delta.index].append(delta)
        return {
            **self._head,
            "system_fingerprint": self._plans.fingerprint,
            "object": "chat.completion" if self._request.chat else "text_completion",
            "choices": [self._whole_choice(i, parts) for i, parts in enumerate(by_answer)],
            "usage": dict(usage),
            "rap": self._report(),
        }

    def _report(self) -> dict[str, Any]:
        return self._plans.report() | {"ignored": self._request.ignored}

    def _whole_choice(self, index: int, deltas: Sequence[OutputDelta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        logprobs = [entry for delta in deltas for entry in delta.logprobs]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := deltas[-1].calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "finish_reason": deltas[-1].finish_reason,
            "logprobs": self._logprobs_json(logprobs),
            **({"message": message} if self._request.chat else {"text": text}),
        }

    def opening(self) -> list[bytes]:
        """First events of a stream: in a chat, the role of each answer."""
        if not self._request.chat:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(i, {"delta": delta}) for i in range(self._request.size)]

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        """Events of a stream for one delta; in a chat, the finish reason is a separate event."""
        self._unfinished -= delta.finish_reason is not None
        if not self._request.chat:
            body = {"text": delta.text}
            return [self._chunk(delta.index, body, delta.finish_reason, delta.logprobs)]
        events = []
        if delta.text or delta.logprobs:
            content = {"delta": {"content": delta.text}}
            events.append(self._chunk(delta.index, content, logprobs=delta.logprobs))
        if delta.calls:
            calls = [{"index": number, **call} for number, call in enumerate(delta.calls)]
            events.append(self._chunk(delta.index, {"delta": {"tool_calls": calls}}))
        if delta.finish_reason:
            events.append(self._chunk(delta.index, {"delta": {}}, delta.finish_reason))
        return events

    def closing(self, usage: Mapping[str, Any]) -> list[bytes]:
        """Last events of a stream."""
        if not self._request.include_usage:
            return [DONE]
        last = {**self._stream_head(), "choices": [], "usage": dict(usage)}
        return [event({**last, "rap": self._report()}), DONE]

    def _chunk(
        self,
        index: int,
        body: Mapping[str, Any],
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> bytes:
        entries = self._logprobs_json(logprobs) if logprobs else None
        choice = {"index": index, **body, "logprobs": entries, "finish_reason": finish_reason}
        chunk = {**self._stream_head(), "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = None
        elif finish_reason is not None and not self._unfinished:
            chunk["rap"] = self._report()
        return event(chunk)

    def _stream_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        fingerprint = self._plans.fingerprint  # of the plans so far
        return {**self._head, "system_fingerprint": fingerprint, "object": kind}

    def _logprobs_json(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        most = self._request.params.top_logprobs
        if most is None:
            return None
        if self._request.chat:
            return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_likely(entry) for entry in entries] if most else None,
            "text_offset": [entry.offset for entry in entries],
        }


def _likely(entry: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens and the token itself; of tokens with one text, the likeliest."""
    if entry.logprob is None:
        return None
    return dict([(entry.token, entry.logprob), *reversed(entry.top)])


def _chat_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {
        **_token_json(entry.token, entry.logprob),
        "top_logprobs": [_token_json(token, logprob) for token, logprob in entry.top],
    }


def _token_json(token: str, logprob: float | None) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in token
    return {
        "token": token,
        "logprob": logprob,
        "bytes": list(token.encode()) if whole else None,
    }


def usage_of(generation: Generation) -> dict[str, Any]:
    """Numbers of tokens in the format of the API."""
    prompt, completion = generation.request.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.kept_tokens},
    }


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event. Its JSON is ASCII, so that no client finds a line break in it."""
    return f"data: {json.dumps(content)}\n\n".encode()


@contextlib.asynccontextmanager
async def cancel_on_disconnect(request: Request, generation: Generation) -> AsyncIterator[None]:
    """Cancel a generation as soon as its client disconnects, within a ``with`` block."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.cancel(ClientDisconnect())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class EventStreamResponse(StreamingResponse):
    """A response that is written while it is generated.

    `on_end` is called once with the outcome, also after an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        generation: Generation,
        writer: AnswerWriter,
        on_end: Callable[[str], None],
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers)
        self._request = request
        self._generation = generation
        self._writer = writer
        self._on_end = on_end
        self._deltas = generation.deltas()
        self._first: OutputDelta | None = None
        self._outcome = "disconnected"

    async def first(self) -> None:
        """Wait for the first delta."""
        async with cancel_on_disconnect(self._request, self._generation):
            self._first = await anext(self._deltas)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream."""
        try:
            async with cancel_on_disconnect(self._request, self._generation):
                await self.stream_response(send)
        finally:
            self._on_end(self._outcome)

    async def _events(self) -> AsyncIterator[bytes]:
        assert self._first is not None
        for content in (*self._writer.opening(), *self._writer.chunks(self._first)):
            yield content
        try:
            async for delta in self._deltas:
                for content in self._writer.chunks(delta):
                    yield content
            for content in self._writer.closing(usage_of(self._generation)):
                yield content
            self._outcome = "ok"
        except ApiError as error:  # the status is already sent, so the error is an event
            self._outcome = error.outcome
            yield event(error.to_json(self._request.scope))
        except ClientDisconnect:
            return

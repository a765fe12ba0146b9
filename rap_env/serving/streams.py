"""Answers as server-sent events, and an eye on whether anybody still listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rap_env.serving.answers import AnswerWriter, usage_of
from rap_env.serving.errors import ApiError
from rap_env.serving.generation import Generation, Piece


@dataclass
class Watch:
    """What is known of the client.

    Attributes:
        gone: Whether it has gone away.
    """

    gone: bool = False


@contextlib.asynccontextmanager
async def watch_disconnect(request: Request, generation: Generation) -> AsyncIterator[Watch]:
    """Cancel a generation as soon as its client goes away, within a ``with`` block."""
    watch = Watch()

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        watch.gone = True
        generation.cancel()

    task = asyncio.create_task(wait())
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class EventStream(Response):
    """A response that is written while it is generated.

    Args:
        request: The request.
        generation: What is being generated.
        writer: How it is written.
        on_end: Called once with the outcome, whatever happens.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        generation: Generation,
        writer: AnswerWriter,
        on_end: Callable[[str], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._generation = generation
        self._writer = writer
        self._on_end = on_end
        self._pieces = generation.pieces()
        self._first: Piece | None = None

    async def first(self) -> None:
        """Wait for the first piece.

        Raises:
            ApiError: There is none.
            ClientDisconnect: The client went away.
        """
        watch = Watch()
        try:
            async with watch_disconnect(self._request, self._generation) as watch:
                self._first = await anext(self._pieces)
        except ApiError:
            if watch.gone:
                raise ClientDisconnect from None
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream."""
        outcome = "disconnected"
        try:
            async with watch_disconnect(self._request, self._generation) as watch:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                outcome = await self._write(send, watch)
        finally:
            self._on_end(outcome)

    async def _write(self, send: Send, watch: Watch) -> str:
        outcome = "ok"
        try:
            for event in self._writer.opening(self._generation.size):
                await _send(send, event)
            assert self._first is not None
            for event in self._writer.chunks(self._first):
                await _send(send, event)
            async for piece in self._pieces:
                for event in self._writer.chunks(piece):
                    await _send(send, event)
            for event in self._writer.closing(self._usage()):
                await _send(send, event)
        except ApiError as error:  # too late for a status: the API then sends an event
            if watch.gone:
                return "disconnected"
            outcome = error.outcome
            await _send(send, f"data: {json.dumps(error.to_json())}\n\n".encode())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome

    def _usage(self) -> dict[str, int]:
        return usage_of(self._generation.prompt_tokens, self._generation.completion_tokens)


async def _send(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})

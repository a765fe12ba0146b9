"""Streams responses as server-sent events, and cancels generations whose client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rap_env.serving.errors import ApiError
from rap_env.serving.generation import Generation, OutputDelta
from rap_env.serving.responses import ResponseWriter, event, usage_of


@dataclass
class ClientState:
    """State of a client.

    Attributes:
        disconnected: Whether it has disconnected.
    """

    disconnected: bool = False


@contextlib.asynccontextmanager
async def watch_disconnect(request: Request, generation: Generation) -> AsyncIterator[ClientState]:
    """Cancel a generation as soon as its client disconnects, within a ``with`` block."""
    client = ClientState()

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        client.disconnected = True
        generation.cancel()

    task = asyncio.create_task(wait())
    try:
        yield client
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class EventStreamResponse(Response):
    """A response that is written while it is generated.

    Args:
        request: The HTTP request.
        generation: The generation, started.
        writer: Writes the events.
        on_end: Called once with the outcome, also after an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        generation: Generation,
        writer: ResponseWriter,
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
        self._deltas = generation.deltas()
        self._first: OutputDelta | None = None

    async def first(self) -> None:
        """Wait for the first delta.

        Raises:
            ApiError: The generation failed before it.
            ClientDisconnect: The client disconnected.
        """
        client = ClientState()
        try:
            async with watch_disconnect(self._request, self._generation) as client:
                self._first = await anext(self._deltas)
        except ApiError:
            if client.disconnected:
                raise ClientDisconnect from None
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream."""
        outcome = "disconnected"
        try:
            async with watch_disconnect(self._request, self._generation) as client:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                outcome = await self._write(send, client)
        finally:
            self._on_end(outcome)

    async def _write(self, send: Send, client: ClientState) -> str:
        outcome = "ok"
        try:
            assert self._first is not None
            await _send(send, *self._writer.opening(), *self._writer.chunks(self._first))
            async for delta in self._deltas:
                await _send(send, *self._writer.chunks(delta))
            await _send(send, *self._writer.closing(usage_of(self._generation)))
        except ApiError as error:  # the status is already sent, so the error is an event
            if client.disconnected:
                return "disconnected"
            outcome = error.outcome
            await _send(send, event(error.to_json()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome


async def _send(send: Send, *events: bytes) -> None:
    for content in events:
        await send({"type": "http.response.body", "body": content, "more_body": True})

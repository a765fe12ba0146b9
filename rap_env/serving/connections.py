"""Connections within limits: of their number, and of the patience with each."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from rap_env.serving.errors import unavailable
from rap_env.serving.settings import ServingSettings


def guarded_protocol(settings: ServingSettings) -> type[H11Protocol]:
    """The HTTP protocol of uvicorn, within limits of connections and of patience.

    A connection is cut that does not send a header in time, or does not read its answer; one
    beyond the most is told so at once.
    """

    class Guarded(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(_FULL)
                transport.close()
                return
            self._header_timer = self.loop.call_later(settings.header_timeout_s, self._no_header)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._header_timer = _stopped(self._header_timer)
            elif self._header_timer is None and (before is None or before.response_complete):
                # The first bytes of a further request on this connection.
                self._header_timer = self.loop.call_later(
                    settings.header_timeout_s, self._no_header
                )

        def connection_lost(self, exc: Exception | None) -> None:
            self._header_timer = _stopped(self._header_timer)
            self._write_timer = _stopped(self._write_timer)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.write_timeout_s, self._cut)

        def resume_writing(self) -> None:
            self._write_timer = _stopped(self._write_timer)
            super().resume_writing()

        def _no_header(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._cut()

        def _cut(self) -> None:
            self.transport.abort()

    return Guarded


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, once this one is cancelled."""
    if timer is not None:
        timer.cancel()
    return None


def _raw_response() -> bytes:
    error = unavailable("Too many connections; ask again later.", "too_many_connections")
    body = json.dumps(error.to_json()).encode()
    head = (
        f"HTTP/1.1 {error.status} Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_FULL = _raw_response()

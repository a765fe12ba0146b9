"""uvicorn with timeouts for slow clients and a graceful shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from rap_env.serving.app import Service

HEADER_TIMEOUT_S = 20.0
"""Seconds until a header must be complete."""
WRITE_TIMEOUT_S = 60.0
"""Seconds that an answer may stay unread before its connection is closed."""
_MAX_HEADER_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15
_UNREAD_BYTES = 16 * 1024
"""Bytes of an answer that wait for its client here, and about as many in the system."""
_FLUSH_S = 5
"""Seconds after the grace period in which error responses are still written to clients."""


class _GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts.

    It closes connections that do not send a header in time or do not read their answer.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # So that what a client does not read is noticed here, not kept by the system.
        transport.set_write_buffer_limits(high=_UNREAD_BYTES)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES
        )
        self._start_header_timer()

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._no_header)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._header_timer = _cancelled(self._header_timer)
        elif self._header_timer is None and (before is None or before.response_complete):
            # The first bytes of another request on this connection.
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer = _cancelled(self._header_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._write_timer = _cancelled(self._write_timer)
        super().resume_writing()

    def _no_header(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; return None, the new value of its variable."""
    if timer is not None:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    """A uvicorn server with a graceful shutdown.

    At SIGTERM or SIGINT it accepts no more requests. Running requests get `shutdown_grace_s`
    to finish; then they are cancelled with an error response. `on_ready` is called when the
    server accepts requests.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] = lambda: None) -> None:
        self._service: Service = app.state.service
        self._on_ready = on_ready
        settings = self._service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=_GuardedProtocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.shutdown_grace_s) + 1 + _FLUSH_S,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, let running ones finish within the grace period, then cancel."""
        self._service.closing = True
        loop = asyncio.get_running_loop()
        grace_s = self._service.settings.shutdown_grace_s
        timer = loop.call_later(grace_s, self._service.cancel_running)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down gracefully; at a second SIGINT, immediately.

        uvicorn itself would raise the signal again afterwards, and the program could not
        clean up.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self._service.closing = True

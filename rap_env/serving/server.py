"""uvicorn with a graceful shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rap_env.serving.app import Service
from rap_env.serving.http import GuardedProtocol

_MAX_HEADER_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15
_FLUSH_S = 5
"""Seconds after the grace period in which error responses are still written to clients."""


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
                http=GuardedProtocol,
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

"""uvicorn with the manners that a server needs: patience with an end, none with idlers."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI

from rap_env.errors import ServingSettingsError
from rap_env.serving.connections import guarded_protocol
from rap_env.serving.service import Service

_MOST_HEADER_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15
_LAST_S = 5
"""Seconds after the grace in which cancelled answers are still written to their clients."""


class Server(uvicorn.Server):
    """A uvicorn server that ends in order.

    At SIGTERM or SIGINT it takes no more requests; those that run get `shutdown_grace_s`, then
    they are cancelled and their clients told so.

    Args:
        app: What `create_app` gave.
        on_ready: Called once it can be asked.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] = lambda: None) -> None:
        self._service: Service = app.state.service
        self._on_ready = on_ready
        grace_s = self._service.settings.shutdown_grace_s
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded_protocol(self._service.settings),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(grace_s) + 1 + _LAST_S,
                h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let the running ones end for a while, then end them."""
        self._service.closing = True
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._service.settings.shutdown_grace_s, self._service.end_running)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order; at a second SIGINT, at once.

        uvicorn would raise the signal again after that, and the program could not clean up.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self._service.closing = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet; port 0 takes a free one.

    Raises:
        ServingSettingsError: The address is taken, forbidden, or not of this machine.
    """
    try:
        if not 0 <= port <= 65535:  # the system would take the lower bits
            raise OverflowError("a port is a number from 0 to 65535")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        remedy = (
            "end what listens there, or choose another port" if taken else "check host and port"
        )
        raise ServingSettingsError(f"Cannot listen at {host}:{port} ({error}); {remedy}.") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address that a socket is bound to, as a client writes it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BackgroundServer:
    """A server in a thread of its own, within a ``with`` block: for tests and measurements.

    Args:
        app: What `create_app` gave.
        host: Where to listen.
        port: The port; 0 takes a free one.
        start_timeout_s: Seconds in which it must have started.

    Attributes:
        url: Its address, once it has been entered.
    """

    def __init__(
        self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, start_timeout_s: float = 60.0
    ) -> None:
        self._server = Server(app)
        self._socket = bind(host, port)
        self._start_timeout_s = start_timeout_s
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http-server", daemon=True
        )
        self.url = url_of(self._socket)

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        deadline = time.monotonic() + self._start_timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ServingSettingsError(f"The server at {self.url} did not start.")
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self, **_: Any) -> None:
        """End in order, and wait for the end."""
        self._server.handle_exit(signal.SIGTERM, None)
        self._thread.join()

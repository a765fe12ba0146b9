"""What all routes share: request ids, API keys, bodies within limits, errors, and timeouts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rap_env.errors import RapError, ServingSettingsError
from rap_env.runtime.memory_limit import file_state

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
CLIENT_CLOSED_REQUEST = 499
"""Status of a response that no client receives, as in nginx's log."""
PROBE_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""Paths of the probes."""
OPEN_PATHS = PROBE_PATHS | {"/", "/docs", "/openapi.json"}
"""Paths that need no key."""
QUIET_PATHS = PROBE_PATHS | {"/metrics"}
"""Paths whose lines of the log have the level debug."""
MOST_BODIES_BYTES = 32 * 2**20
"""Most bytes of the bodies of all requests together."""
BODY_TIMEOUT_S = 20.0
"""Seconds until a body must be complete."""
HEADER_TIMEOUT_S = 20.0
"""Seconds until a header must be complete."""
WRITE_TIMEOUT_S = 60.0
"""Seconds that an answer may stay unread before its connection is closed."""
_UNREAD_BYTES = 16 * 1024
"""Bytes of an answer that wait for its client here, and about as many in the system."""
LINGER_BYTES = 8 * 1024 * 1024
"""Bytes of a rejected body that are still read and dropped: a client that is cut off while it
sends seldom reads the error response."""
_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_KEY = re.compile(r"[!-~]+")  # what a header can hold without quotes


# Errors


@dataclass(eq=False)
class ApiError(RapError):
    """Error response: an HTTP status, and the API's message, type, field (`param`) and code."""

    status: int
    message: str
    _: KW_ONLY
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def outcome(self) -> str:
        """Label in the metrics: the code, or a name for the status."""
        return self.code or ("invalid" if self.status < 500 else "error")

    def to_json(self, scope: Scope) -> dict[str, Any]:
        """Body of the response to the request of an ASGI scope, which has the request's id."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
                "request_id": scope.get("state", {}).get("request_id"),
            }
        }

    def response(self, scope: Scope) -> JSONResponse:
        """Response to the request of an ASGI scope."""
        return JSONResponse(self.to_json(scope), self.status, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the request is invalid."""
    return ApiError(400, message, param=param, code=code)


def unavailable(
    message: str, code: str = "service_unavailable", *, retry_after_s: int | None = 1
) -> ApiError:
    """503: the server cannot answer this request now, but may after some seconds.

    Without these, it cannot as long as its limits stay, and OpenAI's clients do not ask
    again.
    """
    if retry_after_s is None:
        headers = {"x-should-retry": "false"}
    else:
        headers = {"retry-after": str(retry_after_s)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def failed(message: str) -> ApiError:
    """500: an unexpected error."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def shown(value: object, most: int = 80) -> str:
    """Text of a value for an error message, shortened to `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


# Keys


class ApiKeys:
    """The keys of a file, of which only the SHA-256 stays in memory.

    The file is read again when it changes; one that cannot be used then changes nothing, and one
    warning is logged.

    Args:
        path: The file: one key per line; empty lines and those that begin with # are skipped.

    Raises:
        ServingSettingsError: The file cannot be read, has no key, or a line is not a key. The
            message does not quote the line.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._state = file_state(path)
        self._digests = self._read()

    def _read(self) -> set[bytes]:
        path, digests = self._path, set()
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ServingSettingsError(
                f"Cannot read api_key_file {path}: {error.strerror}."
            ) from None
        except UnicodeDecodeError:
            raise ServingSettingsError(
                f"api_key_file {path} must be a text file in UTF-8."
            ) from None
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line or line.startswith("#"):
                continue
            if not _KEY.fullmatch(line):
                raise ServingSettingsError(
                    f"Line {number} of api_key_file {path} must be a key of visible ASCII "
                    "characters without spaces, or a comment that begins with #."
                )
            digests.add(_digest(line))
        if not digests:
            raise ServingSettingsError(
                f"api_key_file {path} has no key; write one per line, for example the output of "
                "'openssl rand -hex 32'."
            )
        return digests

    def __contains__(self, key: str) -> bool:
        """Whether a key is one of them; takes the same time for every key."""
        if (state := file_state(self._path)) != self._state:
            self._state = state
            try:
                self._digests = self._read()
            except ServingSettingsError as error:
                log.warning("The keys stay as they are: %s", error)
        given = _digest(key)
        return sum(hmac.compare_digest(known, given) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class RequestGate:
    """ASGI middleware that gives each request an id, checks its key, and logs a line at its end.

    A client's own id is kept if it has 1 to 128 letters, digits or characters of
    ``._:/+=@-``. Requests without a valid key get status 401, except probes and pages that tell
    nothing of the model. Applications
    find the id as ``request.state.request_id``, what names its key as
    ``request.state.owner``, and may add to the line:
    ``request.state.outcome``, ``request.state.reason`` (why it was not answered), and what
    the function ``request.state.log_fields`` returns.

    Args:
        app: The application.
        keys: The keys of clients, who send ``Authorization: Bearer KEY`` or ``x-api-key: KEY``;
            None if none is needed.
        on_end: Called with the state of each request when it has ended.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys | None, on_end: Callable[[dict[str, Any]], None]
    ) -> None:
        self._app = app
        self._keys = keys
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _VALID_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["owner"] = "" if self._keys is None else _digest(key).hex()
        started, status = time.monotonic(), CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = REQUEST_ID_HEADER.encode(), request_id.encode()
                message["headers"] = [*message["headers"], header]
            await send(message)

        refusal = self._refusal(scope["path"], key)
        app = self._app if refusal is None else refusal.response(scope)
        try:
            await app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            self._on_end(scope["state"])
            _log_request(scope, status, time.monotonic() - started)

    def _refusal(self, path: str, key: str) -> ApiError | None:
        """The error for a request without a valid key; None if it has one, or needs none."""
        if self._keys is None or path in OPEN_PATHS or key in self._keys:
            return None
        seen = "Incorrect API key provided" if key else "You didn't provide an API key"
        return ApiError(
            401,
            f"{seen}; send a key of this server in the header 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    state, method = scope["state"], scope["method"]
    path = shown(scope["raw_path"].decode("ascii"))  # as sent: no line breaks
    known = {name: state.get(name) for name in ("outcome", "reason")}
    known |= state.get("log_fields", dict)()
    known = {name: value for name, value in known.items() if value not in (None, {})}
    words = [f" {name}={_quoted(value)}" for name, value in known.items()]
    log.log(
        logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO,
        f"{state['request_id']} {method} {path} {status} {seconds:.3f} s{''.join(words)}",
    )


def _quoted(value: object) -> str:
    """Text of a value, in quotes if it has spaces; of a mapping as ``name:value,name:value``."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    text = ",".join(f"{name}:{each}" for name, each in pairs) or str(value)
    return json.dumps(text) if " " in text else text


# Bodies


class RequestBodies:
    """Reads the bodies of requests within limits, and counts what is open.

    A request counts from when its body is complete until it has ended; bodies count from their
    first byte. Where they have too many bytes together, the one that has been incomplete for
    longest is given up, so that clients that never complete theirs keep no request out.

    Args:
        most_bytes: Most bytes of a body, unpacked.
        most_open: Most requests that are open at a time; more get status 503.
        on_refusal: Called for each of these.
    """

    def __init__(self, most_bytes: int, most_open: int, on_refusal: Callable[[], None]) -> None:
        self._most_bytes, self._most_open, self._on_refusal = most_bytes, most_open, on_refusal
        self._open = self._bytes = 0
        self._incomplete: dict[asyncio.Timeout, bool] = {}

    async def read(self, request: Request) -> dict[str, Any]:
        """Read the body of an HTTP request, a JSON object, whatever its content type says.

        Raises:
            ApiError: 400 if the body is invalid, 413 if it is too long, whether or not it
                declares its length, 408 if it is too slow, 415 if its encoding is not known,
                503 if too much is open.
            ClientDisconnect: The client disconnected.
        """
        packing = request.headers.get("content-encoding", "identity")
        if packing not in ("identity", "gzip"):
            raise ApiError(
                415,
                f"Unsupported content encoding: '{shown(packing)}'; send gzip or none.",
                code="unsupported_content_encoding",
            )
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as deadline:
                self._incomplete[deadline] = True
                body = await self._receive(request)
        except TimeoutError:
            if not self._incomplete[deadline]:
                raise self._refused() from None
            raise ApiError(
                408,
                f"The request body was not complete after {BODY_TIMEOUT_S:g} seconds.",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
        finally:
            del self._incomplete[deadline]
        if body is not None and packing == "gzip":
            unpacking = zlib.decompressobj(31)
            try:
                body = unpacking.decompress(body, self._most_bytes + 1)
            except zlib.error as error:
                raise invalid(f"The body is no gzip: {error}.", code="invalid_gzip") from None
            self._bytes += len(body) - request.state.body_bytes
            request.state.body_bytes = len(body)
            body = body if len(body) <= self._most_bytes else None
        if body is None:
            raise ApiError(
                413,
                f"The request body is longer than {self._most_bytes} bytes, the most that this "
                "server reads (max_body_bytes).",
                code="request_too_large",
                headers={"connection": "close"},
            )
        if self._open >= self._most_open or self._bytes > MOST_BODIES_BYTES:
            raise self._refused()
        self._open += 1
        request.state.open = True
        return parse_json(body)

    async def _receive(self, request: Request) -> bytes | None:
        """The body as it was sent; None if it is too long."""
        body, seen_bytes = bytearray(), 0
        async for chunk in request.stream():
            seen_bytes += len(chunk)
            if seen_bytes <= self._most_bytes:
                body += chunk
                self._bytes += len(chunk)
                request.state.body_bytes = len(body)
                if self._bytes > MOST_BODIES_BYTES:
                    self._give_up_oldest()
                    await asyncio.sleep(0)  # it may be this one
            elif seen_bytes > self._most_bytes + LINGER_BYTES:
                break
        return None if seen_bytes > self._most_bytes else bytes(body)

    def _give_up_oldest(self) -> None:
        deadline = next((each for each, waits in self._incomplete.items() if waits), None)
        if deadline is not None:
            self._incomplete[deadline] = False
            deadline.reschedule(0)

    def _refused(self) -> ApiError:
        self._on_refusal()
        return unavailable("Too many requests are open; ask again later.", "too_many_open")

    def release(self, state: dict[str, Any]) -> None:
        """Note that a request with this state has ended."""
        self._open -= state.get("open", False)
        self._bytes -= state.get("body_bytes", 0)


class JsonRoute(APIRoute):
    """A route whose body is read by the `bodies` of the application's state."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of requests."""
        handle, has_body = super().get_route_handler(), self.body_field is not None

        async def read_and_handle(request: Request) -> Response:
            if has_body:
                body = await request.app.state.bodies.read(request)
                request = _JsonRequest(request.scope, request.receive, body)
            return await handle(request)

        return read_and_handle


class _JsonRequest(Request):
    """A request whose body has been read."""

    def __init__(self, scope: Scope, receive: Receive, content: dict[str, Any]) -> None:
        kept = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        super().__init__(
            {**scope, "headers": [*kept, (b"content-type", b"application/json")]}, receive
        )
        self._content = content

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> dict[str, Any]:
        return self._content


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; anything else is an `ApiError` (400)."""
    try:
        value = json.loads(body, parse_constant=_reject_constant)
        if b"\\u" in body:  # may be half of a surrogate pair, which no response could quote
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(
            f"We could not parse the JSON body of your request: {shown(str(error))}.",
            code="invalid_json",
        ) from None
    if not isinstance(value, dict):
        raise invalid(
            f"The body must be a JSON object, not {type(value).__name__}.", code="invalid_json"
        )
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


# Connections


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts.

    It closes connections that do not send a header in time or do not read their answer.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the header."""
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
        """Stop the timer at a whole header; start it at the first bytes of another request."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._header_timer = _cancelled(self._header_timer)
        elif self._header_timer is None and (before is None or before.response_complete):
            # The first bytes of another request on this connection.
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._header_timer = _cancelled(self._header_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer of unread bytes."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of unread bytes."""
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

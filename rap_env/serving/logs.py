"""Log lines of a server, and the ids of its requests, which each response and line names."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rap_env.serving.access import UNLIMITED_PATHS
from rap_env.serving.errors import CLIENT_CLOSED_REQUEST, shown
from rap_env.serving.settings import ServerSettings

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TEXT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


class TextFormatter(logging.Formatter):
    """A line with time (UTC), level and message; a traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT, _TIME)
        self.converter = time.gmtime


class JsonFormatter(TextFormatter):
    """A JSON object per line: ``time``, ``level``, ``logger`` and ``message``.

    A record's ``fields``, given as ``extra={"fields": {...}, "event": "..."}``, are further keys,
    and its ``event`` is the message then, which repeats none of them. A traceback is in
    ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        entry = {
            "time": f"{self.formatTime(record, _TIME)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": vars(record).get("event") or record.getMessage(),
            **vars(record).get("fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


@contextlib.contextmanager
def server_logging(settings: ServerSettings) -> Iterator[None]:
    """Log to standard error as the settings say, within a ``with`` block.

    The process's handlers for the console are replaced; others, such as files, stay.
    """
    root, package = logging.getLogger(), logging.getLogger("rap_env")
    level = settings.log_level.upper()
    handlers, package_level = root.handlers[:], package.level
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    handler.setLevel(level)
    package.setLevel(level)
    root.handlers[:] = [*(h for h in handlers if type(h) is not logging.StreamHandler), handler]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        package.setLevel(package_level)
        handler.close()


class RequestIds:
    """ASGI middleware that gives each request an id, and logs one line when it has ended.

    A client's own id is kept if it has 1 to 128 letters, digits or characters of ``._:/+=@-``.
    Applications find the id as ``request.state.request_id``, and may add to the line:
    ``request.state.outcome``, ``request.state.reason`` (why it was not answered), and what the
    function ``request.state.log_fields`` returns.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _VALID_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = REQUEST_ID_HEADER.encode(), request_id.encode()
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            _log_request(scope, status, time.monotonic() - started)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    state, method = scope["state"], scope["method"]
    path = shown(scope["raw_path"].decode("ascii"))  # as sent: no line breaks
    known = {name: state.get(name) for name in ("outcome", "reason")}
    known |= state.get("log_fields", dict)()
    known = {name: value for name, value in known.items() if value is not None}
    fields = {
        "request_id": state["request_id"],
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 3),
        **known,
    }
    log.log(
        logging.DEBUG if scope["path"] in UNLIMITED_PATHS else logging.INFO,
        "%s %s %s %d %.3f s%s", state["request_id"], method, path, status, seconds,
        "".join(f" {name}={_quoted(value)}" for name, value in known.items()),
        extra={"fields": fields, "event": "request ended"},
    )  # fmt: skip


def _quoted(value: object) -> str:
    """Text of a value, in quotes if it has spaces."""
    text = str(value)
    return json.dumps(text) if " " in text else text

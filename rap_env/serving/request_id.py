"""Request ids: taken from the client or made, sent back in each response, and logged."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rap_env.serving.errors import CLIENT_CLOSED_REQUEST, shown
from rap_env.serving.probes import UNLIMITED_PATHS

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_VALID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestIds:
    """ASGI middleware that gives each request an id, and logs one line when it has ended.

    A client's own id is kept if it has 1 to 128 letters, digits or characters of ``._:/+=@-``.
    Applications find the id as ``request.state.request_id``. The line is at level INFO; for
    probes and metrics, at DEBUG. An application may add to it: `request.state.outcome`, and what
    the function `request.state.log_fields` returns, by name.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _VALID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
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
            state, method = scope["state"], scope["method"]
            path = shown(scope["raw_path"].decode("ascii"))  # as sent: no line breaks
            seconds = time.monotonic() - started
            more = {"outcome": state.get("outcome"), **state.get("log_fields", dict)()}
            more = {name: value for name, value in more.items() if value is not None}
            fields = {"request_id": request_id, "method": method, "path": path, "status": status,
                      "seconds": round(seconds, 3), **more}  # fmt: skip
            log.log(
                logging.DEBUG if scope["path"] in UNLIMITED_PATHS else logging.INFO,
                "%s %s %s %d %.3f s%s", request_id, method, path, status, seconds,
                "".join(f" {name}={_quoted(value)}" for name, value in more.items()),
                extra={"fields": fields},
            )  # fmt: skip


def _quoted(value: object) -> str:
    """Text of a value, in quotes if it has spaces."""
    text = str(value)
    return json.dumps(text) if " " in text else text

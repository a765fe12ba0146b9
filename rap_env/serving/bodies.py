"""Request bodies, read with an eye on their size and on the clock."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from rap_env.serving.errors import invalid, shown, too_large, too_slow
from rap_env.serving.settings import ServingSettings

LINGER_BYTES = 8 * 1024 * 1024
LINGER_S = 2.0
"""How much of a refused body is still read and dropped, and for how long: a client that is
cut off while it sends seldom reads the answer that says why."""


async def read_json(request: Request, settings: ServingSettings) -> dict[str, Any]:
    """The JSON object in a request's body.

    Args:
        request: The request; its body has not been read.
        settings: Limits of size and time.

    Raises:
        ApiError: 400 if it is no JSON object, 413 if it is too long, whether or not it says so
            beforehand, 408 if it is too slow.
        ClientDisconnect: The client went away.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise invalid(
            f"Unsupported content type: '{shown(kind)}'; send 'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    return parsed(await _read(request, settings))


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds.

    Raises:
        ApiError: It holds none (400).
    """
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
        if b"\\u" in body:  # half a character can be written so, and no answer could quote it
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(
            f"We could not parse the JSON body of your request: {shown(str(error))}.",
            code="invalid_json",
        ) from None
    if not isinstance(found, dict):
        raise invalid(
            f"The body must be a JSON object, not {type(found).__name__}.", code="invalid_json"
        )
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


async def _read(request: Request, settings: ServingSettings) -> bytes:
    most = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        if "expect" not in request.headers and int(declared) <= LINGER_BYTES:
            await _drop_rest(request)
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
    except TimeoutError:
        raise too_slow(settings.body_timeout_s) from None
    if len(body) > most:
        await _drop_rest(request)
        raise too_large(most)
    return bytes(body)


async def _drop_rest(request: Request) -> None:
    """Read on and forget, within `LINGER_BYTES` and `LINGER_S`."""
    seen = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_S):
            while seen < LINGER_BYTES:
                message = await request.receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                seen += len(message.get("body", b""))

"""Routes for administrators, who have keys of their own: ``/admin/budget``."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rap_env.errors import ServingSettingsError
from rap_env.runtime.process_memory import ProcessMemory
from rap_env.serving.errors import ApiError, invalid
from rap_env.serving.live_limit import LiveLimit
from rap_env.serving.settings import parse_bytes

if TYPE_CHECKING:
    from rap_env.runtime.memory_monitor import MemoryMonitor

BUDGET_PATH = "/admin/budget"
_MOST_BYTES = 1024


def admin_router(monitor: MemoryMonitor, limit: LiveLimit | None) -> APIRouter:
    """Make the routes that show and set the memory limit.

    Args:
        monitor: Knows what the model may take and what it takes.
        limit: The limit; None if the system's free memory is the budget, which cannot be set.
    """
    router = APIRouter()

    def present() -> Response:
        answer: dict[str, Any] = {
            "limit": None if limit is None else limit.name,
            "bytes": None if limit is None else limit(),
            "source": monitor.source.name if limit is None else limit.source,
            "budget_bytes": monitor.budget_bytes,
            "used_bytes": monitor.used_bytes,
        }
        if isinstance(monitor.source, ProcessMemory):
            answer["other_bytes"] = monitor.source.other_bytes
        return JSONResponse(answer)

    @router.get(BUDGET_PATH)
    async def show_budget() -> Response:
        return present()

    @router.put(BUDGET_PATH)
    async def set_budget(request: Request) -> Response:
        if limit is None:
            raise ApiError(
                409,
                "The budget is the system's free memory, which cannot be set; start the server "
                "with memory or model_memory as a number of bytes.",
                code="budget_not_settable",
            )
        wanted = _read_limit(await _read_body(request), limit.name)
        try:
            await asyncio.to_thread(limit.set, wanted, "admin")
        except ServingSettingsError as error:
            raise invalid(str(error), limit.name) from None
        return present()

    return router


async def _read_body(request: Request) -> Any:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BYTES:
            raise invalid(f"The body is longer than {_MOST_BYTES} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _read_limit(body: Any, name: str) -> int:
    """The size in a body such as ``{"memory": "500MiB"}``, with the name of this server's limit."""
    value = body.get(name) if isinstance(body, dict) and len(body) == 1 else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise invalid(f'The body must be a JSON object such as {{"{name}": "500MiB"}}.', name)
    try:
        return parse_bytes(name, value)
    except ServingSettingsError as error:
        raise invalid(str(error), name) from None

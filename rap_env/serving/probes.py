"""Routes for operators: probes, versions and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from rap_env.serving.metrics import CONTENT_TYPE, ServingMetrics
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

PROBE_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/health"})
"""Paths of the probes."""
UNLIMITED_PATHS = PROBE_PATHS | {"/metrics", "/admin/budget"}
"""Paths that are answered above the connection limit too."""


def probe_router(
    engine: Engine,
    metrics: ServingMetrics,
    settings: ServerSettings,
    *,
    closing: Callable[[], bool],
) -> APIRouter:
    """Make the routes ``/livez``, ``/readyz``, ``/healthz``, ``/version`` and ``/metrics``.

    ``/health`` is ``/healthz`` under the name that it has in vLLM's and llama.cpp's servers.

    Args:
        engine: The engine that serves.
        metrics: What ``/metrics`` renders.
        settings: Settings of the server.
        closing: Whether the server shuts down.
    """
    router, model = APIRouter(), settings.served_name
    versions = {
        "version": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "model": model,
        "fingerprint": engine.llm.fingerprint,
    }

    @router.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> Response:
        reason = "The server is shutting down." if closing() else engine.unready_reason()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503)

    @router.get("/health")
    @router.get("/healthz")
    async def healthz() -> Response:
        if closing():
            return JSONResponse({"status": "closing"}, 503)
        if not engine.alive:
            return JSONResponse({"status": "engine stopped"}, 503)
        return JSONResponse({"status": "ok", "model": model})

    @router.get("/version")
    async def show_versions() -> Response:
        # In a thread: a new budget takes a search.
        longest = settings.max_prompt_tokens or await asyncio.to_thread(
            engine.longest_prompt.tokens
        )
        return JSONResponse({**versions, "max_prompt_tokens": longest})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        # In a thread: reading the memory of the process may wait for a step to end.
        text = await asyncio.to_thread(metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return router

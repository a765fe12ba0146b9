"""Routes for operators and for tokens: probes, versions, metrics, the limit, and tokenizing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rap_env.errors import ServingSettingsError
from rap_env.serving.errors import ApiError, invalid
from rap_env.serving.limits import LiveLimit
from rap_env.serving.metrics import CONTENT_TYPE, ServingMetrics
from rap_env.serving.prompts import RequestBuilder
from rap_env.serving.schemas import (
    DetokenizeRequest,
    TokenizeRequest,
    parse_json,
    read_json,
    validate_fields,
)
from rap_env.serving.settings import ServerSettings, parse_bytes
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_monitor import MemoryMonitor


def probe_router(
    engine: Engine,
    metrics: ServingMetrics,
    settings: ServerSettings,
    *,
    closing: Callable[[], bool],
) -> APIRouter:
    """Make the routes ``/livez``, ``/readyz``, ``/healthz``, ``/version`` and ``/metrics``.

    ``/health`` is ``/healthz`` under the name that it has in vLLM's and llama.cpp's servers.
    `closing` tells whether the server shuts down.
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
            engine.longest_prompt_tokens
        )
        return JSONResponse({**versions, "max_prompt_tokens": longest})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        # In a thread: reading the memory of the process may wait for a step to end.
        text = await asyncio.to_thread(metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return router


def admin_router(monitor: MemoryMonitor, limit: LiveLimit | None) -> APIRouter:
    """Make the routes that show and set the memory limit, for administrators.

    `limit` is None if the system's free memory is the budget, which cannot be set.
    """
    router = APIRouter()

    def present() -> Response:
        answer: dict[str, Any] = {
            "limit": None if limit is None else limit.name,
            "bytes": None if limit is None else limit(),
            "source": monitor.source.name if limit is None else limit.source,
            "budget_bytes": monitor.budget_now_bytes(),
            "used_bytes": monitor.used_bytes,
        }
        others = monitor.source.other_bytes
        return JSONResponse(answer if others is None else {**answer, "other_bytes": others})

    @router.get("/admin/budget")
    async def show_budget() -> Response:
        return present()

    @router.put("/admin/budget")
    async def set_budget(request: Request) -> Response:
        if limit is None:
            raise ApiError(
                409,
                "The budget is the system's free memory, which cannot be set; start the server "
                "with memory or model_memory as a number of bytes.",
                code="budget_not_settable",
            )
        body = parse_json(await request.body())
        size = body.get(limit.name) if len(body) == 1 else None
        if not isinstance(size, str | int) or isinstance(size, bool):
            example = f'{{"{limit.name}": "500MiB"}}'
            raise invalid(f"The body must be a JSON object such as {example}.", limit.name)
        try:
            await asyncio.to_thread(limit.set, parse_bytes(limit.name, size), "admin")
        except ServingSettingsError as error:
            raise invalid(str(error), limit.name) from None
        return present()

    return router


def tokenization_router(
    builder: RequestBuilder, tokenizer: Any, settings: ServerSettings
) -> APIRouter:
    """Make the routes ``/tokenize`` and ``/detokenize``, as in vLLM's server.

    `builder` encodes texts and messages exactly as for completions.
    """
    router = APIRouter()

    def encode(body: TokenizeRequest) -> list[int]:
        if body.prompt is not None and body.messages is None:
            return builder.encode_text(body.prompt)
        if body.messages is None or body.prompt is not None:
            raise invalid("Give either 'prompt' or 'messages'.", "prompt")
        return builder.encode_chat(body.messages)

    def decode(tokens: list[int]) -> str:
        if tokens and max(tokens) >= len(tokenizer):
            raise invalid(
                f"Token {max(tokens)} is not in the tokenizer's vocabulary "
                f"(0 to {len(tokenizer) - 1}).",
                "tokens",
            )
        text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = validate_fields(TokenizeRequest, await read_json(request, settings))
        builder.check_model(body.model)
        tokens = await asyncio.to_thread(encode, body)
        answer = {"count": len(tokens), "max_model_len": builder.context_tokens, "tokens": tokens}
        return JSONResponse(answer)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = validate_fields(DetokenizeRequest, await read_json(request, settings))
        builder.check_model(body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(decode, body.tokens)})

    return router

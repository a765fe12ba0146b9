"""The server's routes: OpenAI's completions, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rap_env.errors import RapError
from rap_env.serving.errors import ApiError, failed, unknown_model
from rap_env.serving.metrics import CONTENT_TYPE
from rap_env.serving.schemas import ChatRequest, CompletionRequest
from rap_env.serving.service import Service
from rap_env.serving.settings import ServingSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status for the log alone: nobody is there to read it."""


def create_app(engine: Engine, tokenizer: Any, settings: ServingSettings) -> FastAPI:
    """The server's application; the engine is started and closed with it.

    Args:
        engine: What generates; not started.
        tokenizer: The model's tokenizer.
        settings: Names and limits.

    Returns:
        An ASGI application; its `state.service` is the `Service`.
    """
    service = Service(engine, tokenizer, settings)
    app = FastAPI(
        title="rap-env", version=__version__, lifespan=service.lifespan,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.state.service = service
    _add_completions(app, service)
    _add_looks(app, service)
    _add_errors(app, service)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answered(service, request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answered(service, request, CompletionRequest)


async def _answered(
    service: Service, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    """The answer, or the error as the API writes it."""
    try:
        return await service.complete(request, kind)
    except ClientDisconnect:
        service.count(request, "disconnected")
        return Response(status_code=CLIENT_GONE)
    except ApiError as error:
        service.count(request, error.outcome)
        return as_response(error)
    except RapError as error:
        log.exception("A request failed")
        service.count(request, "error")
        return as_response(failed(str(error)))


def _add_looks(app: FastAPI, service: Service) -> None:
    def described() -> dict[str, Any]:
        name = service.settings.model_name
        return {"id": name, "object": "model", "created": service.started, "owned_by": "rap-env"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.settings.model_name:
            return as_response(unknown_model(name, service.settings.model_name))
        return JSONResponse(described())

    @app.get("/healthz")
    async def healthz() -> Response:
        if service.closing:
            return JSONResponse({"status": "closing"}, 503)
        if not service.engine.alive:
            return JSONResponse({"status": "engine stopped"}, 503)
        return JSONResponse({"status": "ok", "model": service.settings.model_name})

    @app.get("/metrics")
    async def metrics() -> Response:
        # In a thread: a look at the process's memory may wait for a step to end.
        text = await asyncio.to_thread(service.metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE})


def _add_errors(app: FastAPI, service: Service) -> None:
    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        texts = {404: f"Invalid URL ({where})", 405: f"Method not allowed ({where})"}
        message = texts.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return as_response(ApiError(error.status_code, message, headers=headers))

    async def broken(request: Request, _error: Exception) -> Response:
        service.count(request, "error")
        return as_response(failed("The server had an error while it processed your request."))

    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, broken)


def as_response(error: ApiError) -> Response:
    """An error as the API writes it."""
    return JSONResponse(error.to_json(), error.status, headers=error.headers)

"""ASGI application: OpenAI's completion routes, and routes for operators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rap_env.errors import RapError
from rap_env.importance.text_kinds import mean_shares
from rap_env.runtime.structured_output import GrammarCompiler
from rap_env.serving.access import RequireApiKey, open_keys
from rap_env.serving.answer_plans import AnswerPlans
from rap_env.serving.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    failed,
    shown,
    shutting_down,
    unavailable,
    unknown_model,
)
from rap_env.serving.generation import Generation
from rap_env.serving.limits import LiveLimit
from rap_env.serving.logs import REQUEST_ID_HEADER, RequestIds
from rap_env.serving.metrics import ServingMetrics
from rap_env.serving.prompts import RequestBuilder, grammar_compiler
from rap_env.serving.responses import (
    EventStreamResponse,
    ResponseWriter,
    cancel_on_disconnect,
    usage_of,
)
from rap_env.serving.routes import admin_router, probe_router, tokenization_router
from rap_env.serving.schemas import ChatCompletionRequest, CompletionRequest, read_json, validate
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

log = logging.getLogger(__name__)

Schema = type[ChatCompletionRequest] | type[CompletionRequest]

ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
"""Names of the completion routes in the metrics."""


class Service:
    """State that the routes share: the engine, the metrics and the running generations.

    While `closing`, the server shuts down and accepts no more requests. The arguments are those of
    `create_app`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        settings: ServerSettings,
        limit: LiveLimit | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.limit = limit
        self.metrics = ServingMetrics(engine, settings)
        self.api_keys, self.admin_keys = open_keys(settings)
        self.closing = False
        self._running: set[Generation] = set()
        grammars = grammars or grammar_compiler(engine.llm, tokenizer, engine.vocab_size)
        self.builder = RequestBuilder(engine, tokenizer, settings, grammars)
        policy = engine.controller.chooser.policy
        self._server = repr((engine.llm.fingerprint, policy.name, __version__))

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Start the engine with the server and close it with the server."""
        self.engine.start()
        try:
            yield
        finally:
            self.closing = True
            await asyncio.to_thread(self.engine.close, timeout_s=self.settings.shutdown_grace_s)

    def cancel_running(self) -> None:
        """Cancel all running generations because the server shuts down."""
        for generation in list(self._running):
            generation.cancel(shutting_down())

    def reload_keys(self) -> None:
        """At SIGHUP: read the files of keys again; an invalid one changes nothing."""
        for keys in (self.api_keys, self.admin_keys):
            if keys is not None:
                keys.reload()

    async def respond(self, request: Request, schema: Schema) -> Response:
        """Respond to a completion request; errors are left to the application's handlers."""
        if self.closing:
            raise shutting_down()
        if self.limit is not None and (problem := self.limit.nothing_fits()):
            wait_s = self.limit.retry_after_s
            raise unavailable(problem, "insufficient_memory", retry_after_s=wait_s)
        body = validate(schema, await read_json(request, self.settings))
        built = await asyncio.to_thread(self.builder.build, body)
        predict = partial(
            self.engine.controller.chooser.delta_nll,
            seq_len_tokens=built.final_tokens,
            text_shares=mean_shares(built.text_shares),
        )
        plans = AnswerPlans(predict, self._server)
        generation = Generation(self.engine, self.tokenizer, built, self.metrics, plans)
        request.state.log_fields = generation.log_fields
        generation.start()
        self._running.add(generation)
        writer = ResponseWriter(built, model=self.settings.served_name, plans=plans)
        respond = self._stream if built.stream else self._whole
        return await respond(request, generation, writer)

    async def _whole(
        self, request: Request, generation: Generation, writer: ResponseWriter
    ) -> Response:
        try:
            async with cancel_on_disconnect(request, generation):
                deltas = [delta async for delta in generation.deltas()]
        finally:
            self._finish(generation)
        self.count(request, "ok")
        return JSONResponse(writer.whole(deltas, usage_of(generation)), headers=writer.headers())

    async def _stream(
        self, request: Request, generation: Generation, writer: ResponseWriter
    ) -> Response:
        def ended(outcome: str) -> None:
            self._finish(generation)
            self.count(request, outcome)

        stream = EventStreamResponse(request, generation, writer, ended)
        try:
            await stream.first()  # an error before the first token still sets the status
        except BaseException:
            self._finish(generation)
            raise
        return stream

    def _finish(self, generation: Generation) -> None:
        self._running.discard(generation)
        generation.cancel()

    def count(self, request: Request, outcome: str) -> None:
        """Note the outcome of a request for its line of the log, and count completion requests."""
        request.state.outcome = outcome
        if endpoint := ENDPOINTS.get(request.url.path):
            self.metrics.requests.labels(endpoint, outcome).inc()


def create_app(
    engine: Engine,
    tokenizer: Any,
    settings: ServerSettings,
    limit: LiveLimit | None = None,
    grammars: GrammarCompiler | None = None,
) -> FastAPI:
    """Make the server's ASGI application, which starts and closes the engine.

    Its `state.service` is the `Service`.

    Args:
        engine: The engine.
        tokenizer: The tokenizer of its model.
        settings: Settings of the server.
        limit: The memory limit, which administrators may change; None if the budget is another.
        grammars: Compiles what answers have to follow, for the engine's model; by default one that
            loads its vocabulary for the first grammar.

    Raises:
        ServingSettingsError: A file of keys cannot be read.
    """
    service = Service(engine, tokenizer, settings, limit, grammars)
    app = FastAPI(
        title="rap-env", version=__version__, lifespan=service.lifespan,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.state.service = service
    keys, admin_keys = service.api_keys, service.admin_keys
    if (keys, admin_keys) != (None, None):
        app.add_middleware(RequireApiKey, keys=keys, admin_keys=admin_keys)
    app.add_middleware(RequestIds)
    _add_completion_routes(app, service)
    _add_error_handlers(app, service)
    if admin_keys is not None:
        app.include_router(admin_router(engine.controller.monitor, limit))
    app.include_router(
        probe_router(engine, service.metrics, settings, closing=lambda: service.closing)
    )
    app.include_router(tokenization_router(service.builder, tokenizer, settings))
    return app


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    name = service.settings.served_name
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "rap-env"}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.respond(request, ChatCompletionRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.respond(request, CompletionRequest)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def retrieve_model(asked: str) -> Response:
        if asked != name:
            raise unknown_model(asked, name)
        return JSONResponse(model)


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RapError)
    async def rejected(request: Request, error: RapError) -> Response:
        if not isinstance(error, ApiError):
            log.error("Request %s failed", request.state.request_id, exc_info=error)
            error = failed(str(error))
        service.count(request, error.outcome)
        if error.status >= 429:  # it is not the client's mistake
            request.state.reason = shown(str(error), 400)
        return error.response(request.scope)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, _error: ClientDisconnect) -> Response:
        service.count(request, "disconnected")
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        hint = "; start the server with --admin-key-file" * (request.url.path == "/admin/budget")
        texts = {404: f"Invalid URL ({where}){hint}", 405: f"Method not allowed ({where})"}
        message = texts.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return ApiError(error.status_code, message, headers=headers).response(request.scope)

    @app.exception_handler(Exception)
    async def broken(request: Request, _error: Exception) -> Response:
        service.count(request, "error")
        error = failed("The server had an error while it processed your request.")
        error.headers[REQUEST_ID_HEADER] = request.state.request_id  # outside of the middleware
        return error.response(request.scope)

"""ASGI application: OpenAI's completion routes, probes and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rap_env.errors import RapError
from rap_env.runtime.structured_output import GrammarCompiler
from rap_env.serving.generation import AnswerPlans, Generation
from rap_env.serving.http import (
    CLIENT_CLOSED_REQUEST,
    REQUEST_ID_HEADER,
    ApiError,
    ApiKeys,
    JsonRoute,
    RequestBodies,
    RequestGate,
    failed,
    invalid,
    shown,
    unavailable,
)
from rap_env.serving.metrics import CONTENT_TYPE, ServingMetrics
from rap_env.serving.prompts import Body, RequestBuilder, grammar_compiler
from rap_env.serving.responses import (
    AnswerWriter,
    EventStreamResponse,
    ResponseWriter,
    cancel_on_disconnect,
    usage_of,
)
from rap_env.serving.responses_api import ResponsesRequest, ResponsesWriter
from rap_env.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_body,
    first_error,
)
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

log = logging.getLogger(__name__)

ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
}
"""Names of the completion routes in the metrics."""
_LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_BODY_BYTES_PER_TOKEN, _LEAST_BODY_BYTES = 32, 256 * 1024
_MOST_NAMES = 100
"""Most names of fields that the log says to be ignored."""


class Service:
    """State that the routes share: the engine, the metrics and the running generations.

    While `closing`, the server shuts down and accepts no more requests. The arguments are
    those of `create_app`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        settings: ServerSettings,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.name = settings.served_name
        self.metrics = ServingMetrics(engine, settings)
        keys = settings.api_key_file
        self.api_keys = None if keys is None else ApiKeys(keys)
        self.closing = False
        self._limited = settings.limits_bytes
        self._noted: set[str] = set()
        self._running: set[Generation] = set()
        grammars = grammars or grammar_compiler(engine.llm, tokenizer, engine.vocab_size)
        self.builder = RequestBuilder(engine, tokenizer, settings, grammars)
        policy = engine.controller.chooser.policy
        body_bytes = max(_LEAST_BODY_BYTES, _BODY_BYTES_PER_TOKEN * engine.max_seq_len_tokens)
        self.bodies = RequestBodies(
            settings.max_body_bytes or body_bytes,
            settings.max_open_requests,
            self.metrics.refused_requests.inc,
        )
        self._server = repr((engine.llm.fingerprint, policy.name, __version__))

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Start the engine with the server and close it with the server."""
        self.engine.start()
        sampling = ", ".join(f"{name} {value}" for name, value in self.builder.sampling.items())
        log.info("Answers are sampled with %s unless a request says otherwise.", sampling)
        try:
            yield
        finally:
            self.closing = True
            await asyncio.to_thread(self.engine.close, timeout_s=self.settings.shutdown_grace_s)

    def cancel_running(self) -> None:
        """Cancel all running generations because the server shuts down."""
        for generation in list(self._running):
            generation.cancel(_shutting_down())

    async def respond(self, request: Request, body: Body | ResponsesRequest) -> Response:
        """Respond to a completion request; errors are left to the application's handlers."""
        if self.closing:
            raise _shutting_down()
        if self._limited and (problem := self.engine.nothing_fits()):
            wait_s = self.engine.retry_after_s()
            raise unavailable(problem, "insufficient_memory", retry_after_s=wait_s)
        chat = body.chat() if isinstance(body, ResponsesRequest) else body
        check_body(chat, strict=self.settings.strict)
        built = await asyncio.to_thread(self.builder.build, chat, request.state.owner)
        self._note_ignored(built.ignored)
        chooser = self.engine.controller.chooser
        predict = partial(chooser.delta_nll, seq_len_tokens=built.final_tokens)
        plans = AnswerPlans(predict, self._server)
        generation = Generation(self.engine, self.tokenizer, built, self.metrics, plans)
        request.state.log_fields = generation.log_fields
        generation.start()
        self._running.add(generation)
        kind = ResponsesWriter if isinstance(body, ResponsesRequest) else ResponseWriter
        writer: AnswerWriter = kind(built, model=self.name, plans=plans)
        respond = self._stream if built.stream else self._whole
        return await respond(request, generation, writer)

    async def _whole(
        self, request: Request, generation: Generation, writer: AnswerWriter
    ) -> Response:
        try:
            async with cancel_on_disconnect(request, generation):
                deltas = [delta async for delta in generation.deltas()]
        finally:
            self._finish(generation)
        self.count(request, "ok")
        return JSONResponse(writer.whole(deltas, usage_of(generation)))

    async def _stream(
        self, request: Request, generation: Generation, writer: AnswerWriter
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

    def _note_ignored(self, ignored: Sequence[str]) -> None:
        """Log once what requests ask for and has no effect."""
        for name in ignored:
            if name not in self._noted and len(self._noted) < _MOST_NAMES:
                self._noted.add(name)
                log.warning("Ignored in requests, as it has no effect here: %s", shown(name))

    def _finish(self, generation: Generation) -> None:
        self._running.discard(generation)
        generation.cancel()

    def count(self, request: Request, outcome: str) -> None:
        """Note the outcome of a request for its line of the log, and count completion requests."""
        request.state.outcome = outcome
        if endpoint := ENDPOINTS.get(request.url.path):
            self.metrics.requests.labels(endpoint, outcome).inc()


def _shutting_down() -> ApiError:
    return unavailable("The server is shutting down; ask again later.", "shutting_down")


def create_app(
    engine: Engine,
    tokenizer: Any,
    settings: ServerSettings,
    grammars: GrammarCompiler | None = None,
) -> FastAPI:
    """Make the server's ASGI application, which starts and closes the engine.

    Its `state.service` is the `Service`.

    Args:
        engine: The engine.
        tokenizer: The tokenizer of its model.
        settings: Settings of the server.
        grammars: Compiles what answers have to follow, for the engine's model; by default one
            that loads its vocabulary for the first grammar.

    Raises:
        ServingSettingsError: The file of keys cannot be read.
    """
    service = Service(engine, tokenizer, settings, grammars)
    app = FastAPI(
        title="rap-env",
        version=__version__,
        lifespan=service.lifespan,
        redoc_url=None,
        openapi_url=None if settings.no_docs else "/openapi.json",
    )
    app.router.route_class = JsonRoute
    app.state.service, app.state.bodies = service, service.bodies
    app.add_middleware(RequestGate, keys=service.api_keys, on_end=service.bodies.release)
    local = settings.cors_origin == "localhost"
    app.add_middleware(  # outside of the gate: browsers send no key with a preflight
        CORSMiddleware,
        allow_origins=() if local else [settings.cors_origin],
        allow_origin_regex=_LOCAL_ORIGIN if local else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER],
    )
    _add_completion_routes(app, service)
    _add_facts(app, service)
    _add_probes(app, service)
    _add_error_handlers(app, service)
    return app


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    name, created = service.name, int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "rap-env"}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        return await service.respond(request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await service.respond(request, body)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await service.respond(request, body)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def retrieve_model(asked: str) -> Response:
        service.builder.check_model(asked)
        return JSONResponse(model)


def _add_facts(app: FastAPI, service: Service) -> None:
    """Add what clients of llama.cpp and vLLM ask for beside completions."""
    builder, tokenizer = service.builder, service.tokenizer

    @app.get("/")
    async def root() -> Response:
        routes = sorted(route.path for route in app.routes if isinstance(route, JsonRoute))
        return JSONResponse({"about": "rap-env: an OpenAI-compatible server", "routes": routes})

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/props")
    async def props() -> Response:
        context = {"n_ctx": builder.context_tokens, "params": {**builder.sampling}}
        slots, template = service.settings.max_batch_size, tokenizer.chat_template or ""
        about = {"default_generation_settings": context, "total_slots": slots}
        return JSONResponse({**about, "model_alias": service.name, "chat_template": template})

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        ids = await asyncio.to_thread(builder.encode, body.content, body.add_special)
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": builder.context_tokens}
        )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        known = [token for token in body.tokens if token < service.engine.vocab_size]
        if len(known) < len(body.tokens):
            raise invalid("'tokens' has ids that are not in the model's vocabulary.", "tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens)
        return JSONResponse({"content": text, "prompt": text})


def _add_probes(app: FastAPI, service: Service) -> None:
    """Add ``/livez``, ``/readyz``, ``/health`` and ``/metrics``."""
    engine = service.engine

    @app.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        closing = "The server is shutting down." if service.closing else None
        if reason := closing or engine.unready_reason():
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/health")
    async def health() -> Response:
        if service.closing or not engine.alive:
            return JSONResponse({"status": "closing" if service.closing else "engine stopped"}, 503)
        return JSONResponse({"status": "ok", "model": service.name})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        # In a thread: reading the memory of the process may wait for a step to end.
        text = await asyncio.to_thread(service.metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE})


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

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        return await rejected(request, first_error(error.errors()))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, _error: ClientDisconnect) -> Response:
        service.count(request, "disconnected")
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        texts = {404: f"Invalid URL ({where})", 405: f"Method not allowed ({where})"}
        message = texts.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return ApiError(error.status_code, message, headers=headers).response(request.scope)

    @app.exception_handler(Exception)
    async def broken(request: Request, _error: Exception) -> Response:
        service.count(request, "error")
        error = failed("The server had an error while it processed your request.")
        # Outside of the middleware.
        error.headers[REQUEST_ID_HEADER] = request.state.request_id
        return error.response(request.scope)

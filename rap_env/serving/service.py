"""What the server's routes share: the engine, the counters, and what runs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rap_env.serving.answers import AnswerWriter, usage_of
from rap_env.serving.bodies import read_json
from rap_env.serving.errors import ApiError, unavailable
from rap_env.serving.generation import Generation
from rap_env.serving.metrics import ServingMetrics
from rap_env.serving.planning import Planner, stop_tokens
from rap_env.serving.schemas import ChatRequest, CompletionRequest, read_request
from rap_env.serving.settings import ServingSettings
from rap_env.serving.streams import EventStream, watch_disconnect
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine


class Service:
    """What the routes share.

    Args:
        engine: What generates; not started.
        tokenizer: Its tokenizer.
        settings: Names and limits.

    Attributes:
        metrics: Counters.
        closing: Whether the server is about to end and takes no more requests.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServingSettings) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = ServingMetrics(engine, settings)
        self.closing = False
        self.started = int(time.time())
        self._running: set[Generation] = set()
        self._planner = Planner(
            tokenizer,
            settings,
            context_tokens=engine.max_seq_len_tokens,
            stop_token_ids=stop_tokens(engine.llm, tokenizer),
        )
        made_of = (settings.fingerprint, settings.policy_name, __version__)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
        self.system_fingerprint = f"fp_{digest[:10]}"

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """The engine runs while the server does."""
        self.engine.start()
        try:
            yield
        finally:
            self.closing = True
            await asyncio.to_thread(self.engine.close, timeout_s=self.settings.shutdown_grace_s)

    def end_running(self) -> None:
        """Cancel what still runs; its clients are told that the server ends."""
        for generation in list(self._running):
            generation.cancel(closing=True)

    async def complete(
        self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        """Answer a request for a completion.

        Raises:
            ApiError: It cannot be answered.
            ClientDisconnect: The client went away.
        """
        if self.closing:
            raise unavailable("The server is shutting down; ask again later.", "shutting_down")
        body = await read_json(request, self.settings)
        asked = read_request(kind, body)
        plan = await asyncio.to_thread(self._planner.plan, asked)
        generation = Generation(
            self.engine,
            self.tokenizer,
            plan,
            on_first=self.metrics.first_token_s.observe,
            on_end=self.metrics.per_token_s.observe,
        )
        generation.start()
        self._running.add(generation)
        writer = AnswerWriter(
            chat=kind is ChatRequest,
            model=self.settings.model_name,
            fingerprint=self.system_fingerprint,
            logprobs=asked.wants_logprobs,
            include_usage=asked.include_usage,
        )
        answer = self._stream if asked.stream else self._whole
        return await answer(request, generation, writer)

    async def _whole(
        self, request: Request, generation: Generation, writer: AnswerWriter
    ) -> Response:
        try:
            async with watch_disconnect(request, generation) as watch:
                pieces = [piece async for piece in generation.pieces()]
        except ApiError:
            if watch.gone:
                raise ClientDisconnect from None
            raise
        finally:
            self._running.discard(generation)
            generation.cancel()
        usage = usage_of(generation.prompt_tokens, generation.completion_tokens)
        self.count(request, "ok")
        return JSONResponse(writer.whole(pieces, generation.size, usage))

    async def _stream(
        self, request: Request, generation: Generation, writer: AnswerWriter
    ) -> Response:
        def ended(outcome: str) -> None:
            self._running.discard(generation)
            generation.cancel()
            self.count(request, outcome)

        stream = EventStream(request, generation, writer, ended)
        try:
            await stream.first()  # an error before any token still has a status of its own
        except BaseException:
            self._running.discard(generation)
            generation.cancel()
            raise
        return stream

    def count(self, request: Request, outcome: str) -> None:
        """Count a request that has ended."""
        chat = request.url.path.endswith("/chat/completions")
        self.metrics.requests.labels("chat" if chat else "completions", outcome).inc()

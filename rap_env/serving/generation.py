"""Runs a generation request: engine events become text in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    InvalidRequestError,
    QueueFullError,
)
from rap_env.runtime.request_handle import EndEvent, Event, RequestHandle, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.detokenizer import Detokenizer, StopStrings, plain_text
from rap_env.serving.errors import ApiError, failed, invalid, queue_full, unavailable

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

MIN_LOGPROB = -9999.0
"""Value that the API writes for a probability of zero."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability.

    Attributes:
        token: Its text, which may be a part of a character.
        logprob: Natural logarithm of its probability.
    """

    token: str
    logprob: float


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate for one HTTP request, and how to write the response.

    Attributes:
        prompts: Token ids of each prompt.
        params: Sampling parameters.
        n: Number of answers to each prompt.
        stop_strings: Strings that end an answer.
        logprobs: Whether to return log probabilities.
        chat: Whether it is a chat completion.
        stream: Whether to stream the response.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1
    stop_strings: Sequence[str] = ()
    logprobs: bool = False
    chat: bool = False
    stream: bool = False
    include_usage: bool = False

    @property
    def size(self) -> int:
        """Number of answers."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    def params_of(self, number: int) -> SamplingParams:
        """Sampling parameters of answer `number`; with a seed, each answer has its own seed."""
        if self.params.seed is None:
            return self.params
        return replace(self.params, seed=(self.params.seed + number) % 2**63)


@dataclass(frozen=True)
class OutputDelta:
    """New output of one answer.

    Attributes:
        index: Number of the answer.
        text: New text; may be empty.
        logprobs: Log probabilities of its tokens, if requested.
        finish_reason: ``"stop"`` or ``"length"`` in the last delta.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass
class _Choice:
    """The state of one answer."""

    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    handle: RequestHandle | None = None
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    ended: bool = False
    pending: list[TokenLogprob] = field(default_factory=list)


class Generation:
    """Generates the answers to one request. All methods run in one event loop.

    Args:
        engine: The engine.
        tokenizer: Its tokenizer.
        request: What to generate.
        on_first: Called with the seconds from arrival to each answer's first token.
        on_end: Called with the seconds per token after the first, for answers that have any.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        request: GenerationRequest,
        *,
        on_first: Callable[[float], None] = lambda seconds: None,
        on_end: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.request = request
        self._on_first = on_first
        self._on_end = on_end
        self._queue: asyncio.Queue[tuple[_Choice, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._choices = [
            _Choice(number, Detokenizer(tokenizer), StopStrings(request.stop_strings))
            for number in range(request.size)
        ]

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all answers."""
        return sum(choice.tokens for choice in self._choices)

    def start(self) -> None:
        """Submit all answers to the engine, or none.

        Raises:
            ApiError: The engine rejects them: 400, 429 or 503.
        """
        try:
            for choice in self._choices:
                choice.handle = self._submit(choice)
        except BaseException as error:
            self.cancel()
            raise _as_api_error(error) from error

    def _submit(self, choice: _Choice) -> RequestHandle:
        def listen(event: Event) -> None:  # called in a thread of the engine
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, event))

        prompt = self.request.prompts[choice.index // self.request.n]
        return self._engine.submit(prompt, self.request.params_of(choice.index), listen)

    def cancel(self, *, closing: bool = False) -> None:
        """Cancel all answers; `deltas` ends soon after.

        Args:
            closing: Whether the reason is the server's shutdown; the error response says so.
        """
        self._closing = self._closing or closing
        for choice in self._choices:
            if choice.handle is not None and not choice.ended:
                choice.handle.cancel()

    async def deltas(self) -> AsyncIterator[OutputDelta]:
        """Yield new output until every answer has ended.

        Raises:
            ApiError: The engine failed, rejected the request, or was cancelled.
        """
        running = self.request.size
        while running:
            choice, event = await self._queue.get()
            if choice.ended:
                continue
            delta = self._token(choice, event) if isinstance(event, TokenEvent) else None
            if isinstance(event, EndEvent):
                delta = self._end(choice, event)
            if delta is None:
                continue
            if delta.finish_reason is not None:
                choice.ended = True
                running -= 1
                self._observe_pace(choice)
            yield delta

    def _token(self, choice: _Choice, event: TokenEvent) -> OutputDelta | None:
        choice.tokens += 1
        choice.last_s = event.time_s
        if choice.tokens == 1:
            choice.first_s = event.time_s
            assert choice.handle is not None
            self._on_first(max(0.0, event.time_s - choice.handle.arrived_s))
        text = choice.stops.add(choice.detokenizer.add(event.token_id))
        if choice.stops.found:
            assert choice.handle is not None
            choice.handle.cancel()
            return OutputDelta(choice.index, text, self._take_logprobs(choice), "stop")
        if self.request.logprobs:
            choice.pending.append(self._logprob(event))
        return OutputDelta(choice.index, text, self._take_logprobs(choice)) if text else None

    def _end(self, choice: _Choice, event: EndEvent) -> OutputDelta:
        if event.reason not in ("stop", "length"):
            raise self._failure(event)
        text = choice.stops.add(choice.detokenizer.finish())
        reason = "stop" if choice.stops.found else event.reason
        text += choice.stops.finish()
        return OutputDelta(choice.index, text, self._take_logprobs(choice), reason)

    def _failure(self, event: EndEvent) -> ApiError:
        if self._closing:
            return unavailable("The server is shutting down; ask again later.", "shutting_down")
        if event.reason == "cancelled":
            return unavailable("The request was cancelled before it was done.", "cancelled")
        message = event.error or "The engine failed; ask again."
        if event.rejection:
            return unavailable(message, "insufficient_memory")
        return failed(message)

    def _take_logprobs(self, choice: _Choice) -> tuple[TokenLogprob, ...]:
        logprobs, choice.pending = tuple(choice.pending), []
        return logprobs

    def _logprob(self, event: TokenEvent) -> TokenLogprob:
        token = plain_text(self._tokenizer, [event.token_id])
        return TokenLogprob(token, max(MIN_LOGPROB, event.logprob))

    def _observe_pace(self, choice: _Choice) -> None:
        if choice.tokens > 1:
            self._on_end(max(0.0, choice.last_s - choice.first_s) / (choice.tokens - 1))


def _as_api_error(error: BaseException) -> BaseException:
    """Error response for an error that the engine raised at submission."""
    if isinstance(error, QueueFullError):
        return queue_full(str(error))
    if isinstance(error, InfeasibleBudgetError):
        return unavailable(str(error), "insufficient_memory")
    if isinstance(error, InvalidRequestError):
        return invalid(str(error))
    if isinstance(error, EngineClosedError):
        return unavailable(str(error), "shutting_down")
    return error

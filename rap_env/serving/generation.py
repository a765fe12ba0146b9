"""One request's answers, from the engine's threads to the server's event loop."""

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
from rap_env.serving.errors import ApiError, failed, invalid, queue_full, unavailable
from rap_env.serving.text import Detokenizer, StopStrings, plain_text

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

LEAST_LOGPROB = -9999.0
"""What the API writes for a probability of zero."""


@dataclass(frozen=True)
class Logprob:
    """A token and its log probability.

    Attributes:
        token: Its text, which is no whole character for some.
        logprob: Natural logarithm of its probability.
    """

    token: str
    logprob: float


@dataclass(frozen=True)
class Plan:
    """What is to be generated for one request.

    Attributes:
        prompts: Token ids of each prompt.
        n: Answers to each of them.
        params: How to sample.
        stops: Strings that end an answer.
        logprobs: Whether log probabilities are wanted.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1
    stops: Sequence[str] = ()
    logprobs: bool = False

    def params_of(self, number: int) -> SamplingParams:
        """How answer `number` is sampled; with a seed, each answer has its own."""
        if self.params.seed is None:
            return self.params
        return replace(self.params, seed=(self.params.seed + number) % 2**63)


@dataclass(frozen=True)
class Piece:
    """What came for one answer.

    Attributes:
        index: Which answer.
        text: New text, perhaps none.
        logprobs: Of the tokens that came, if wanted.
        finish_reason: ``"stop"`` or ``"length"`` with the last piece.
    """

    index: int
    text: str
    logprobs: tuple[Logprob, ...] = ()
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
    pending: list[Logprob] = field(default_factory=list)


class Generation:
    """The answers to one request. Made, listened to and closed in one event loop.

    Args:
        engine: What generates.
        tokenizer: Its tokenizer.
        plan: What to generate.
        on_first: Called with the seconds from arrival to each answer's first token.
        on_end: Called with the seconds per token after the first, for answers that have any.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        plan: Plan,
        *,
        on_first: Callable[[float], None] = lambda seconds: None,
        on_end: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._plan = plan
        self._on_first = on_first
        self._on_end = on_end
        self._queue: asyncio.Queue[tuple[_Choice, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._choices = [
            _Choice(number, Detokenizer(tokenizer), StopStrings(plan.stops))
            for number in range(len(plan.prompts) * plan.n)
        ]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self._plan.prompts))

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all answers."""
        return sum(choice.tokens for choice in self._choices)

    @property
    def size(self) -> int:
        """Number of answers."""
        return len(self._choices)

    def start(self) -> None:
        """Hand all answers to the engine, or none.

        Raises:
            ApiError: The engine does not take them: 400, 429 or 503.
        """
        try:
            for choice in self._choices:
                choice.handle = self._submit(choice)
        except BaseException as error:
            self.cancel()
            raise _as_api_error(error) from error

    def _submit(self, choice: _Choice) -> RequestHandle:
        def listen(event: Event) -> None:  # called in a thread of the engine
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, event))

        prompt = self._plan.prompts[choice.index // self._plan.n]
        return self._engine.submit(prompt, self._plan.params_of(choice.index), listen)

    def cancel(self, *, closing: bool = False) -> None:
        """Have the engine stop; `pieces` ends soon after.

        Args:
            closing: Whether that is because the server ends, which the client is then told.
        """
        self._closing = self._closing or closing
        for choice in self._choices:
            if choice.handle is not None and not choice.ended:
                choice.handle.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, as it comes, until every answer has ended.

        Raises:
            ApiError: The engine failed, gave up waiting, or was told to stop.
        """
        running = self.size
        while running:
            choice, event = await self._queue.get()
            if choice.ended:
                continue
            piece = self._token(choice, event) if isinstance(event, TokenEvent) else None
            if isinstance(event, EndEvent):
                piece = self._end(choice, event)
            if piece is None:
                continue
            if piece.finish_reason is not None:
                choice.ended = True
                running -= 1
                self._note_pace(choice)
            yield piece

    def _token(self, choice: _Choice, event: TokenEvent) -> Piece | None:
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
            return Piece(choice.index, text, self._taken(choice), "stop")
        if self._plan.logprobs:
            choice.pending.append(self._logprob(event))
        return Piece(choice.index, text, self._taken(choice)) if text else None

    def _end(self, choice: _Choice, event: EndEvent) -> Piece:
        if event.reason not in ("stop", "length"):
            raise self._failure(event)
        text = choice.stops.add(choice.detokenizer.finish())
        reason = "stop" if choice.stops.found else event.reason
        text += choice.stops.finish()
        return Piece(choice.index, text, self._taken(choice), reason)

    def _failure(self, event: EndEvent) -> ApiError:
        if self._closing:
            return unavailable("The server is shutting down; ask again later.", "shutting_down")
        if event.reason == "cancelled":
            return unavailable("The request was cancelled before it was done.", "cancelled")
        message = event.error or "The engine failed; ask again."
        if event.refused:
            return unavailable(message, "insufficient_memory")
        return failed(message)

    def _taken(self, choice: _Choice) -> tuple[Logprob, ...]:
        taken, choice.pending = tuple(choice.pending), []
        return taken

    def _logprob(self, event: TokenEvent) -> Logprob:
        token = plain_text(self._tokenizer, [event.token_id])
        return Logprob(token, max(LEAST_LOGPROB, event.logprob))

    def _note_pace(self, choice: _Choice) -> None:
        if choice.tokens > 1:
            self._on_end(max(0.0, choice.last_s - choice.first_s) / (choice.tokens - 1))


def _as_api_error(error: BaseException) -> BaseException:
    """What a client is told when the engine does not take a request."""
    if isinstance(error, QueueFullError):
        return queue_full(str(error))
    if isinstance(error, InfeasibleBudgetError):
        return unavailable(str(error), "insufficient_memory")
    if isinstance(error, InvalidRequestError):
        return invalid(str(error))
    if isinstance(error, EngineClosedError):
        return unavailable(str(error), "shutting_down")
    return error

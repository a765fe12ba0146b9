"""Runs a generation request: engine events become text in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    InvalidRequestError,
    QueueFullError,
)
from rap_env.runtime.request_handle import (
    AdmitEvent,
    EndEvent,
    Event,
    PlanEvent,
    Rejection,
    RequestHandle,
    TokenEvent,
    rejection_of,
)
from rap_env.runtime.sampling import Sample
from rap_env.serving.answers import AnswerPlans, AnswerTimer, Detokenizer, StopStrings
from rap_env.serving.http import ApiError, failed, invalid, unavailable
from rap_env.serving.metrics import ServingMetrics
from rap_env.serving.prompts import GenerationRequest
from rap_env.serving.tool_calls import ToolCallParser

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

# The API's error code for each reason of the engine to reject a request.
_REJECTED: dict[Rejection, str] = {
    "queue_timeout": "insufficient_memory",
    "infeasible": "insufficient_memory",
    "below_floor": "insufficient_quality",
}


class TokenLogprob(NamedTuple):
    """A token's text, maybe part of a character, and the natural log of its probability.

    The first token of a prompt has none. `top` has texts and log probabilities of the most
    likely tokens, most likely first. `offset` is the number of characters before it.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class OutputDelta:
    """New output of answer `index`, with the log probabilities of its tokens if requested.

    The last one has a `finish_reason`, ``"stop"``, ``"length"`` or ``"tool_calls"``, and the
    tool calls.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    calls: Sequence[dict[str, Any]] = ()


@dataclass
class _Choice:
    """The state of one answer."""

    index: int
    handle: RequestHandle
    detokenizer: Detokenizer
    stops: StopStrings
    timer: AnswerTimer
    call_parser: ToolCallParser | None
    echo: str  # what the answer still has to begin with
    text: str = ""  # as it was generated
    content: str = ""  # of it what is no tool call
    tokens: int = 0
    ended: bool = False
    pending: list[TokenLogprob] = field(default_factory=list)
    offset: int = 0  # characters of the tokens with log-probabilities so far


class Generation:
    """Generates the answers to one request. All methods run in one event loop.

    `metrics` counts times; `plans` gets the plan of each pass before the output that it
    computed.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        request: GenerationRequest,
        metrics: ServingMetrics,
        plans: AnswerPlans,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.request = request
        self._metrics = metrics
        self._plans = plans
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cancelled_by: Exception | None = None
        self._choices: list[_Choice] = []

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all answers."""
        return sum(choice.tokens for choice in self._choices)

    @property
    def kept_tokens(self) -> int:
        """Tokens of prompts, each counted once, that were kept of earlier requests."""
        return self._plans.kept_levels.total()

    def log_fields(self) -> dict[str, Any]:
        """What a line of the log says: times and tokens so far, over all answers, and the plan."""
        timers = [choice.timer for choice in self._choices]
        queued = [timer.queue_s for timer in timers if timer.queue_s is not None]
        first = [timer.first_token_s for timer in timers if timer.first_token_s is not None]
        fields = {
            "queue_s": round(max(queued), 3) if queued else None,
            "first_token_s": round(min(first), 3) if first else None,
            "prompt_tokens": self.request.prompt_tokens,
            "answer_tokens": self.completion_tokens,
        }
        return fields | self._plans.report() if first else fields

    def start(self) -> None:
        """Submit all answers to the engine, or none.

        Raises:
            ApiError: The engine rejects them: 400, 429 or 503.
        """
        request = self.request
        try:
            for number in range(request.size):
                prompt = request.prompts[number // request.n]
                timer = AnswerTimer(self._metrics, len(prompt), self._engine.clock())
                parser = request.call_parser() if request.call_parser else None
                self._choices.append(
                    _Choice(
                        number,
                        self._submit(number, prompt, timer),
                        Detokenizer(self._tokenizer, parser.form.marker_id if parser else None),
                        StopStrings(request.stop_strings),
                        timer,
                        parser,
                        request.echo[number // request.n] if request.echo else "",
                    )
                )
        except BaseException as error:
            self.cancel()
            raise self._as_api_error(error) from error

    def _submit(self, number: int, prompt: Sequence[int], timer: AnswerTimer) -> RequestHandle:
        def listen(event: Event) -> None:  # called in a thread of the engine
            timer.add(event)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return self._engine.submit(
            prompt,
            self.request.params_of(number),
            listen,
            owner=self.request.owner,
        )

    def cancel(self, cause: Exception | None = None) -> None:
        """Cancel all answers; `deltas` soon raises the cause, or a general error."""
        self._cancelled_by = cause or self._cancelled_by
        for choice in self._choices:
            if not choice.ended:
                choice.handle.cancel()

    async def deltas(self) -> AsyncIterator[OutputDelta]:
        """Yield new output until every answer has ended.

        Raises:
            ApiError: The engine failed, rejected the request, or was cancelled.
            Exception: The cause that was given to `cancel`.
        """
        running = self.request.size
        while running:
            number, event = await self._queue.get()
            choice = self._choices[number]
            delta = None if choice.ended else self._delta_of(choice, event)
            if delta is None:
                continue
            if delta.finish_reason is not None:
                choice.ended = True
                running -= 1
            yield delta

    def _delta_of(self, choice: _Choice, event: Event) -> OutputDelta | None:
        """Take in an event; return the new output, if there is any."""
        if isinstance(event, AdmitEvent):
            self._plans.add_kept(event.taken.plans)
            handles = [choice.handle for choice in self._choices[:: self.request.n]]
            self._plans.kept_file_tokens = sum(handle.taken.file_tokens for handle in handles)
            self._plans.kept_levels = Counter()
            for handle in handles:
                self._plans.kept_levels.update(handle.taken.levels)
            return None
        if isinstance(event, PlanEvent):
            self._plans.add(event.plan)
            return None
        samples = choice.handle.prompt_samples
        if samples is not None and not choice.tokens:
            self._add_logprob(choice, Sample(choice.handle.prompt_ids[0], 0.0))
            choice.pending[0] = choice.pending[0]._replace(logprob=None)
            for sample in samples:
                self._add_logprob(choice, sample)
        if isinstance(event, TokenEvent):
            return self._token(choice, event)
        return self._end(choice, event)

    def _token(self, choice: _Choice, event: TokenEvent) -> OutputDelta | None:
        choice.tokens += 1
        text = choice.stops.add(choice.detokenizer.add(event.token_id))
        if choice.stops.matched:
            choice.handle.cancel()
            return self._delta(choice, text, "stop")
        self._add_logprob(choice, event)
        return self._delta(choice, text, None) if text or choice.echo else None

    def _end(self, choice: _Choice, event: EndEvent) -> OutputDelta:
        if event.reason not in ("stop", "length"):
            raise self._failure(event)
        text = choice.stops.add(choice.detokenizer.finish())
        reason = "stop" if choice.stops.matched else event.reason
        text += choice.stops.finish()
        if event.stop_token is not None and not self.request.chat:
            self._add_logprob(choice, event.stop_token)
        delta = self._delta(choice, text, reason)
        token_ids, written = choice.handle.token_ids, self.request.written
        special = not self._special_ids.isdisjoint(token_ids)  # the text lacks them
        if written is not None and not choice.stops.matched and not special:
            written(choice.content, delta.calls, choice.text, token_ids)
        return delta

    def _delta(self, choice: _Choice, text: str, reason: str | None) -> OutputDelta:
        """New output, with what the answer has to begin with, and its tool calls."""
        text, choice.echo = choice.echo + text, ""
        choice.text += text
        logprobs, choice.pending = tuple(choice.pending), []
        calls: Sequence[dict[str, Any]] = ()
        if choice.call_parser is not None:
            text, calls = choice.call_parser.add(text, ended=reason is not None)
        choice.content += text
        reason = "tool_calls" if calls and reason == "stop" else reason
        return OutputDelta(choice.index, text, logprobs, reason, calls)

    def _add_logprob(self, choice: _Choice, sample: Sample | TokenEvent) -> None:
        """Add a token's log-probability to the next delta, if the request asks for them."""
        if self.request.params.top_logprobs is None:
            return
        token, *others = (
            self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            for token_id in (sample.token_id, *(other for other, _ in sample.top))
        )
        top = tuple(zip(others, (logprob for _, logprob in sample.top), strict=True))
        choice.pending.append(TokenLogprob(token, sample.logprob, top, choice.offset))
        if sample.token_id not in self._special_ids:  # which the text lacks
            choice.offset += len(token)

    def _failure(self, event: EndEvent) -> Exception:
        if self._cancelled_by is not None:
            return self._cancelled_by
        if event.reason == "cancelled":
            return unavailable("The request was cancelled before it was done.", "cancelled")
        message = event.error or "The engine failed; ask again."
        if event.rejection == "constraint":
            return invalid(message)
        if event.rejection:
            return self._unavailable(message, event.rejection)
        return failed(message)

    def _unavailable(self, message: str, rejection: Rejection) -> ApiError:
        retry_after_s = self._engine.retry_after_s()
        return unavailable(message, _REJECTED[rejection], retry_after_s=retry_after_s)

    def _as_api_error(self, error: BaseException) -> BaseException:
        """Error response for an error that the engine raised at submission."""
        if isinstance(error, QueueFullError):
            retry = {"retry-after": str(self._engine.retry_after_s())}
            code = "rate_limit_exceeded"
            return ApiError(429, str(error), kind="requests", code=code, headers=retry)
        if isinstance(error, InfeasibleBudgetError):
            return unavailable(str(error), _REJECTED[rejection_of(error)], retry_after_s=None)
        if isinstance(error, InvalidRequestError):
            return invalid(str(error))
        if isinstance(error, EngineClosedError):
            return unavailable(str(error), "shutting_down")
        return error

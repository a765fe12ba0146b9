"""Runs a generation request: engine events become text, with its times and its plans."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    InvalidRequestError,
    QueueFullError,
)
from rap_env.plan import Plan
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
from rap_env.serving.http import ApiError, failed, invalid, unavailable
from rap_env.serving.metrics import ServingMetrics
from rap_env.serving.prompts import GenerationRequest, plain_text
from rap_env.serving.tool_calls import ToolCallParser, partial_match

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are not a whole character (yet)."""
_MAX_UNFINISHED = 3
"""Bytes of a UTF-8 character without its last one: so many may wait for it."""
_MAX_TOKENS = 64
"""Tokens after which bytes that never became a character are returned as they are."""

# The API's error code for each reason of the engine to reject a request.
_REJECTED: dict[Rejection, str] = {
    "queue_timeout": "insufficient_memory",
    "infeasible": "insufficient_memory",
    "below_floor": "insufficient_quality",
}


class Detokenizer:
    """Decodes a growing sequence of tokens; text that it has returned never changes.

    The text of a token depends on the tokens before it (a leading space is dropped at the
    start of a text) and, if a character has several bytes, on the tokens after it. So each
    step decodes a short window that begins with tokens whose text was already returned, and
    holds back text that may still change. The work per step does not grow with the sequence.

    Args:
        tokenizer: The model's tokenizer.
        kept_id: A special token that the text keeps.
    """

    def __init__(self, tokenizer: Any, kept_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._kept_id = kept_id
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window whose text was returned
        self._given = 0  # characters of the window's text that were returned

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is final now, often that of the token alone."""
        if token_id == self._kept_id:
            piece: str = self.finish() + self._tokenizer.decode([token_id])
            self._window, self._context, self._given = [], 0, 0
            return piece
        self._window.append(token_id)
        text = plain_text(self._tokenizer, self._window)
        waiting = min(len(text) - len(text.rstrip(UNFINISHED)), _MAX_UNFINISHED)
        if len(self._window) - self._context > _MAX_TOKENS:
            waiting = 0
        certain = len(text) - waiting
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not waiting:
            self._move_on()
        return piece

    def finish(self) -> str:
        """Return the text that was held back; call it after the last token."""
        text = plain_text(self._tokenizer, self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move_on(self) -> None:
        recent = self._window[self._context :]
        # A window without text would be no context.
        if text := plain_text(self._tokenizer, recent):
            self._window, self._given = recent, len(text)
        self._context = len(self._window)


class StopStrings:
    """Truncates streamed text before the first of several stop strings, none of them empty.

    After one has `matched`, no text is returned.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._waiting = ""
        self.matched = False

    def add(self, piece: str) -> str:
        """Add text and return the part that cannot belong to a stop string."""
        if self.matched:
            return ""
        text = self._waiting + piece
        starts = [start for start in map(text.find, self._strings) if start >= 0]
        if starts:
            self.matched = True
            self._waiting = ""
            return text[: min(starts)]
        keep = partial_match(text, self._strings) if self._strings else 0
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was held back; call it after the last text."""
        text, self._waiting = self._waiting, ""
        return text


class AnswerTimer:
    """Times of one answer in seconds since its arrival, from the engine's events.

    Args:
        metrics: Where the times are observed as they become known.
        prompt_tokens: Tokens of the prompt.
        arrived_s: Time of arrival on the engine's clock.
    """

    def __init__(self, metrics: ServingMetrics, prompt_tokens: int, arrived_s: float) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived_s = self._last_s = arrived_s
        self._tokens = 0
        self.queue_s: float | None = None
        self.first_token_s: float | None = None

    def add(self, event: Event) -> None:
        """Take in an event; in their order."""
        seconds = max(0.0, event.time_s - self._arrived_s)
        if isinstance(event, TokenEvent):
            self._tokens += 1
            if self.first_token_s is None:
                self.first_token_s = seconds
                self._metrics.first_token_s.observe(seconds)
            else:
                self._metrics.between_tokens_s.observe(max(0.0, event.time_s - self._last_s))
            self._last_s = event.time_s
        elif isinstance(event, AdmitEvent | EndEvent):
            if self.queue_s is None:
                self.queue_s = seconds
                self._metrics.queue_s.observe(seconds)
            if isinstance(event, EndEvent):
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        metrics = self._metrics
        metrics.answer_s.observe(seconds)
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.answer_tokens.observe(self._tokens)


class AnswerPlans:
    """The plans that computed the answers to one request, in the order of their passes.

    What is reported describes one of them, or of the plans under which tokens were read that
    were kept: the plan with the largest predicted rise in NLL. A plan without a prediction
    counts as larger than any other, and of equal ones the last is reported.

    Args:
        predict: Gives the rise in NLL of a plan in nats per token, None without a prediction.
        server: Names what else determines the answers, such as the model's weights.

    Attributes:
        fingerprint: The API's ``system_fingerprint``: equal for equal `server` and equal
            plans.
        changed: Whether the plan changed from one pass to the next.
        kept_levels: Tokens of the prompts that were kept of earlier requests, by the levels that
            their keys and values had.
        kept_file_tokens: Those of them that were in files.
    """

    def __init__(self, predict: Callable[[Plan], float | None], server: str) -> None:
        self._predict = predict
        self._digest = server
        self._last: Plan | None = None
        self._reported: Plan | None = None
        self._delta_nll: float | None = 0.0
        self.fingerprint = ""
        self.changed = False
        self.kept_levels = Counter[str]()
        self.kept_file_tokens = 0

    def add(self, plan: Plan) -> None:
        """Add the plan of the next pass."""
        if plan == self._last:
            return
        self.add_kept([plan])
        self.changed = self._last is not None
        self._last = plan
        self._digest = hashlib.sha256(f"{self._digest} {plan.digest}".encode()).hexdigest()
        self.fingerprint = f"fp_{self._digest[:10]}"

    def add_kept(self, plans: Iterable[Plan]) -> None:
        """Add the plans under which tokens were read that are kept; they are no passes."""
        for plan in plans:
            rise = self._predict(plan)
            if self._reported is None or _order(rise) >= _order(self._delta_nll):
                self._reported, self._delta_nll = plan, rise

    def report(self) -> dict[str, Any]:
        """The object ``rap`` of a response; ``delta_nll`` is in nats per token."""
        plan = self._reported or Plan()
        return {
            "plan": plan.digest,
            "levels": plan.summary,
            "delta_nll": self._delta_nll,
            "plan_changed": self.changed,
            "kept_tokens": self.kept_levels.total(),
            "kept_levels": self.kept_levels,
            "kept_file_tokens": self.kept_file_tokens,
        }


def _order(rise: float | None) -> float:
    return math.inf if rise is None else rise


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

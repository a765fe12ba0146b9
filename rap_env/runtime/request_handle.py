"""The caller's side of a request: its tokens so far, its end, events, and cancellation.

All times are in seconds on the engine's clock.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rap_env.errors import InfeasibleBudgetError, QualityFloorError
from rap_env.plan import Plan
from rap_env.runtime.sampling import Sample, SamplingParams

log = logging.getLogger(__name__)

Reason = Literal["stop", "length", "cancelled", "error"]
"""Why a request ended: a stop token, its token limit, a cancellation, or a failure."""

Rejection = Literal["queue_timeout", "infeasible", "below_floor", "constraint"]
"""Why the engine gave a request up: it waited too long for others, no plan fits the budget,
only plans below its floor of quality do, or what its answer has to follow is too complex."""


def rejection_of(error: InfeasibleBudgetError) -> Rejection:
    """Why a request is given up that does not fit, by its error."""
    return "below_floor" if isinstance(error, QualityFloorError) else "infeasible"


EXPECTED_TOKENS = 256
"""An answer is expected to end within so many tokens, and within so many more each time that it
does not: what runs is admitted and planned for that, not for the most tokens that may come."""
_ids = itertools.count(1)
_NATIVE = Plan()


@dataclass(frozen=True)
class AdmitEvent:
    """A request left the queue; after a preemption it waits, and is admitted, once more.

    Attributes:
        kept_tokens: Its first tokens that were kept of earlier requests, or of itself before a
            preemption, and are not read again.
        kept_levels: Number of them by the levels that their keys and values had, in words.
        kept_file_tokens: Number of them that were in files.
        kept_plans: The plans under which they were read, with those levels.
    """

    time_s: float
    kept_tokens: int = 0
    kept_levels: Mapping[str, int] = field(default_factory=dict)
    kept_file_tokens: int = 0
    kept_plans: frozenset[Plan] = frozenset()


@dataclass(frozen=True)
class PlanEvent:
    """A pass for the request has ended, and was the first one, or had another plan than before.

    It precedes the tokens that were computed with the plan.
    """

    plan: Plan
    time_s: float


@dataclass(frozen=True)
class TokenEvent:
    """A token was generated.

    Attributes:
        logprob: Its log-probability in nats under the plan.
        plan: The plan that the token was computed with.
        top: The most likely tokens with their log-probabilities, if they were asked for.
    """

    token_id: int
    logprob: float
    time_s: float
    plan: Plan = _NATIVE
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EndEvent:
    """A request ended.

    Attributes:
        error: An error message for the user; None if nothing failed.
        rejection: Set if the engine gave the request up. If it did while the request waited,
            a later attempt may succeed.
        stop_token: The token that ended the answer, if one did.
    """

    reason: Reason
    error: str | None
    time_s: float
    rejection: Rejection | None = None
    stop_token: Sample | None = None


Event = AdmitEvent | PlanEvent | TokenEvent | EndEvent
Listener = Callable[[Event], None]


class RequestHandle:
    """A submitted request and its results. The engine writes it; any thread may read or cancel it.

    Attributes:
        id: A number that is unique in this process.
        arrived_s: Time of arrival.
        admitted_s: Time at which it left the queue for the first time; None before.
        first_token_s: Time of the first token; None before it.
        ended_s: Time of the end; None before it.
        token_ids: The tokens generated so far.
        logprobs: Their log-probabilities in nats.
        prompt_samples: Log-probabilities of the prompt's tokens from the second one on, known
            before the first token; None if they were not asked for.
        plans: The plan that each of them was computed with.
        plan: The plan of the last pass for the request, over its prompt or a token; None
            before.
        reason: Why the request ended; None before its end.
        error: The error message, if the request failed.
        rejection: Why the engine rejected the request after it had waited, if it did.
        kept_tokens: Tokens of its prompt that were kept of earlier requests.
        kept_levels: Number of them by the levels that their keys and values had, in words.
        kept_file_tokens: Number of them that were in files.
        kept_plans: The plans under which tokens that it took over were read, with the levels
            that they had, also after preemptions. Its own tokens depend on them.
        preemptions: How often the request was preempted and restarted from its tokens.
        cancelled: Whether cancellation was requested.
    """

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        arrived_s: float,
        *,
        listener: Listener | None = None,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.id = next(_ids)
        self.prompt_ids = prompt_ids
        self.params = params
        self.arrived_s = arrived_s
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.prompt_samples: tuple[Sample, ...] | None = None
        self.plans: list[Plan] = []
        self.plan: Plan | None = None
        self.reason: Reason | None = None
        self.error: str | None = None
        self.rejection: Rejection | None = None
        self.kept_tokens = 0
        self.kept_levels: Mapping[str, int] = {}
        self.kept_file_tokens = 0
        self.kept_plans: frozenset[Plan] = frozenset()
        self.preemptions = 0
        self.cancelled = False
        self._listener = listener
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._on_cancel = on_cancel

    @property
    def final_tokens(self) -> int:
        """Tokens that its cache is expected to hold; the last generated one is not fed back."""
        expected = (len(self.token_ids) // EXPECTED_TOKENS + 1) * EXPECTED_TOKENS
        return len(self.prompt_ids) + min(expected, self.params.max_new_tokens) - 1

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Request cancellation, from any thread. The engine acts on it between two steps."""
        self.cancelled = True
        on_cancel = self._on_cancel
        if on_cancel is not None:
            on_cancel()

    def result(self, timeout_s: float | None = None) -> RequestHandle:
        """Wait for the end, at most `timeout_s` seconds if given, and return this handle.

        Raises:
            TimeoutError: The request has not ended by then; it continues.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"Request {self.id} has not ended within {timeout_s} s.")
        return self

    def note_plan(self, plan: Plan, time_s: float) -> None:
        """Note the plan of a pass for the request that has ended; only the engine calls this."""
        if plan is not self.plan and plan != self.plan:
            self.emit(PlanEvent(plan, time_s))

    def emit(self, event: Event) -> None:
        """Record an event and pass it to the listener. Only the engine calls this.

        Events after the end are ignored.
        """
        with self._lock:
            if self.done:
                return
            if isinstance(event, TokenEvent):
                self.token_ids.append(event.token_id)
                self.logprobs.append(event.logprob)
                self.plans.append(event.plan)
                if self.first_token_s is None:
                    self.first_token_s = event.time_s
            elif isinstance(event, PlanEvent):
                self.plan = event.plan
            elif isinstance(event, AdmitEvent):
                self.kept_plans |= event.kept_plans
                if self.admitted_s is None:
                    self.admitted_s = event.time_s
                    self.kept_tokens = event.kept_tokens
                    self.kept_levels = event.kept_levels
                    self.kept_file_tokens = event.kept_file_tokens
            else:
                self.ended_s, self.reason, self.error = event.time_s, event.reason, event.error
                self.rejection = event.rejection
            if self._listener is not None:
                try:
                    self._listener(event)
                except Exception:
                    log.exception(
                        "The listener of request %d failed; it is not called again.", self.id
                    )
                    self._listener = None
            if isinstance(event, EndEvent):
                self._ended.set()
                self._listener = self._on_cancel = None

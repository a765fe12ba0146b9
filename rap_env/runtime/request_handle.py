"""A request: its handle for the caller, its sequence in the engine, and delivery between them.

All times are in seconds on the engine's clock.
"""

from __future__ import annotations

import itertools
import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from rap_env.errors import InfeasibleBudgetError, QualityFloorError, RapError
from rap_env.plan import Plan
from rap_env.runtime.records import Counters
from rap_env.runtime.sampling import RowSampler, Sample, SamplingParams, sample_rows

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
NOT_FINITE = "The model returned logits that are not finite."
_ids = itertools.count(1)
_NATIVE = Plan()


class Taken(NamedTuple):
    """What a request took over of earlier requests, or of itself before a preemption.

    Attributes:
        tokens: Number of its first tokens, which are not read again.
        levels: Number of them by the levels that their keys and values had, in words.
        file_tokens: Number of them that were in files.
        plans: The plans under which they were read, with those levels.
    """

    tokens: int = 0
    levels: Mapping[str, int] = {}
    file_tokens: int = 0
    plans: frozenset[Plan] = frozenset()


NOTHING_TAKEN = Taken()


@dataclass(frozen=True)
class AdmitEvent:
    """A request left the queue; after a preemption it waits, and is admitted, once more."""

    time_s: float
    taken: Taken = NOTHING_TAKEN


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
        taken: What it took over of earlier requests.
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
        self.taken = NOTHING_TAKEN
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
                self.kept_plans |= event.taken.plans
                if self.admitted_s is None:
                    self.admitted_s, self.taken = event.time_s, event.taken
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


class ReadPlans:
    """Under which plans the tokens of a cache were computed.

    Args:
        spans: For each span of tokens where it ends, and the plans of all tokens up to there.
    """

    def __init__(self, spans: Sequence[tuple[int, frozenset[Plan]]] = ()) -> None:
        self._spans = list(spans)

    def note(self, tokens: int, plan: Plan) -> None:
        """Note that the cache has `tokens` tokens now, the last ones computed under a plan."""
        before = self._spans[-1][1] if self._spans else frozenset()
        if plan in before:
            self._spans[-1] = tokens, before
        else:
            self._spans.append((tokens, before | {plan}))

    def plans(self, tokens: int) -> frozenset[Plan]:
        """The plans of the first so many tokens."""
        index = bisect_left(self._spans, tokens, key=lambda span: span[0])
        return self._spans[index][1]


class TokenSequence:
    """The tokens of one request, and the sampler that draws the next ones.

    Attributes:
        owner: Whose kept sequences it may use; see `KeptSequences`.
        read: The plans under which its cache was computed.
        queued_since_s: When it last entered the queue, on the engine's clock.
        computed_tokens: Most of its tokens that were in a cache so far.
        refills: Whether its cache may be computed again at better levels.
        unkept: Whether keeping it has to go on (see `KeptSequences.put`).
        unfit_bytes: The largest budget in which it did not fit alone above its own floor.
    """

    def __init__(self, handle: RequestHandle, owner: str = "") -> None:
        self.handle = handle
        self.owner = owner
        self.read = ReadPlans()
        self.sampler = RowSampler(handle.params, handle.prompt_ids)
        self.queued_since_s = handle.arrived_s
        self.computed_tokens = 0
        self.refills = True
        self.unkept = False
        self.unfit_bytes = 0

    @property
    def tokens(self) -> list[int]:
        """All known tokens: the prompt's and the generated ones."""
        return [*self.handle.prompt_ids, *self.handle.token_ids]

    @property
    def known_tokens(self) -> int:
        """The number of known tokens."""
        return len(self.handle.prompt_ids) + len(self.handle.token_ids)

    def progress(self, *, in_batch: bool) -> tuple[int, int]:
        """Cached tokens and tokens to come.

        Args:
            in_batch: Whether the sequence is decoding, so that its last token is not cached
                yet; else the numbers hold for the end of its prefill.
        """
        cached = self.known_tokens - in_batch
        return cached, self.handle.final_tokens - cached

    @property
    def scores_prompt(self) -> bool:
        """Whether its whole prompt has to be read, for log-probabilities that it has not got."""
        return self.handle.params.prompt_logprobs and self.handle.prompt_samples is None

    def preempt(self, time_s: float) -> None:
        """Note that the sequence goes back to the queue."""
        self.handle.preemptions += 1
        self.queued_since_s = time_s


class OutputProcessor:
    """Samples tokens, delivers tokens and ends to request handles, and counts them.

    `counters` has the totals.
    """

    def __init__(self, clock: Callable[[], float], counters: Counters) -> None:
        self._clock = clock
        self.counters = counters

    def deliver(
        self, sequences: Sequence[TokenSequence], logits: torch.Tensor, plans: Sequence[Plan]
    ) -> list[bool]:
        """Sample a token for each sequence and deliver it.

        Args:
            sequences: B sequences.
            logits: (B, V), float32.
            plans: The plan that each of them was computed with.

        Returns:
            For each sequence whether it continues.
        """
        samples = sample_rows([sequence.sampler for sequence in sequences], logits)
        now = self._clock()
        for sequence, plan in zip(sequences, plans, strict=True):
            sequence.handle.note_plan(plan, now)
        return [
            self._deliver(sequence, sample, plan, now)
            for sequence, sample, plan in zip(sequences, samples, plans, strict=True)
        ]

    def end(
        self,
        sequence: TokenSequence,
        reason: Reason,
        error: str | None = None,
        *,
        rejection: Rejection | None = None,
        stop_token: Sample | None = None,
    ) -> None:
        """End a request, unless it has ended."""
        if not sequence.handle.done:
            if rejection not in (None, "constraint"):
                self.counters.refused += 1
            elif reason == "cancelled":
                self.counters.cancelled += 1
            elif reason == "error":
                self.counters.failed += 1
            else:
                self.counters.served += 1
            end = EndEvent(reason, error, self._clock(), rejection, stop_token)
            sequence.handle.emit(end)

    def fail(self, sequences: Iterable[TokenSequence], error: Exception) -> None:
        """End requests whose step raised an error."""
        if isinstance(error, RapError):
            log.warning("A step failed: %s", error)
        else:
            log.error("A step failed.", exc_info=error)
        for sequence in sequences:
            self.end(sequence, "error", f"The step failed: {error}")

    def _deliver(
        self, sequence: TokenSequence, sample: Sample | None, plan: Plan, now: float
    ) -> bool:
        handle, params = sequence.handle, sequence.handle.params
        if sample is None:
            reason = sequence.sampler.error
            rejection: Rejection | None = None if reason is None else "constraint"
            self.end(sequence, "error", reason or NOT_FINITE, rejection=rejection)
            return False
        if sample.token_id in params.stop_token_ids:
            self.end(sequence, "stop", stop_token=sample)
            return False
        handle.emit(TokenEvent(sample.token_id, sample.logprob, now, plan, sample.top))
        self.counters.tokens += 1
        if len(handle.token_ids) < params.max_new_tokens:
            return True
        self.end(sequence, "length")
        return False

"""The requests that wait: which begins next, which can never run, and why.

They begin in order, or any that fits where nothing runs.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from rap_env.errors import (
    EngineClosedError,
    InfeasibleBudgetError,
    QualityFloorError,
    QueueFullError,
    counted,
)
from rap_env.request import human_bytes
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decision import Admit
from rap_env.runtime.memory_estimator import BatchShape, PassSize
from rap_env.runtime.records import EngineSettings
from rap_env.runtime.request_handle import (
    AdmitEvent,
    OutputProcessor,
    Rejection,
    TokenSequence,
    rejection_of,
)
from rap_env.runtime.running import RunningBatch

log = logging.getLogger(__name__)

_STALLED_S = 0.25
"""Seconds without a pass, while requests wait, after which any of them that fits alone is
tried."""
_LONG_STALL_S = 1.0
"""As `_STALLED_S`: then the margin is given up, and the log says why."""
# Of a chunk, tried one after another: smaller passes take less memory.
_CHUNK_PARTS = (1, 2, 4, 8)
_ONE_TOKEN = BatchShape(1, 1)
_MORE = "raise model_memory (or memory), or max_delta_nll"


class RequestQueue:
    """At most `max_size` requests that wait, first come, first served; thread-safe.

    Preempted requests may always return.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._waiting: deque[TokenSequence] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[TokenSequence, ...]:
        """The requests that wait, in order."""
        with self._lock:
            return tuple(self._waiting)

    def append(self, sequence: TokenSequence) -> None:
        """Add a request at the end; raises `QueueFullError` or `EngineClosedError`."""
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed and accepts no more requests.")
            if len(self._waiting) >= self._max_size:
                raise QueueFullError(
                    f"The queue is full: {len(self._waiting)} requests wait, and at most "
                    f"{self._max_size} may. Try again later."
                )
            self._waiting.append(sequence)

    def put_first(self, sequence: TokenSequence) -> None:
        """Add a preempted request at the front."""
        with self._lock:
            self._waiting.appendleft(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Remove a request."""
        with self._lock:
            self._waiting.remove(sequence)

    def remove_if(self, predicate: Callable[[TokenSequence], bool]) -> list[TokenSequence]:
        """Remove and return all requests that match a predicate."""
        if not self._waiting:
            return []
        with self._lock:
            removed = [sequence for sequence in self._waiting if predicate(sequence)]
            if removed:
                self._waiting = deque(kept for kept in self._waiting if kept not in removed)
        return removed

    def close(self) -> list[TokenSequence]:
        """Accept no more requests, and remove and return those that wait."""
        with self._lock:
            self._closed = True
            removed, self._waiting = list(self._waiting), deque()
        return removed


class Admission:
    """Lets waiting requests begin, as far as the controller finds plans for them.

    Args:
        controller: Finds plans.
        queue: The requests that wait.
        batch: What runs.
        output: Rejects requests that can never fit.
        settings: Those of the engine.

    Attributes:
        waiting: Requests that waited when the turn began.
        most_running: Most requests that run now; fewer for a while where memory ran out.
        preempted_s: When a request was preempted last.
        stall_reason: Why requests wait and nothing runs; empty while something does.
    """

    def __init__(
        self,
        controller: RuntimeController,
        queue: RequestQueue,
        batch: RunningBatch,
        output: OutputProcessor,
        settings: EngineSettings,
    ) -> None:
        self._controller = controller
        self._monitor = controller.monitor
        self._chooser = controller.chooser
        self._clock = controller.clock
        self._headroom = controller.headroom
        self._queue = queue
        self._batch = batch
        self._kept = batch.kept
        self._output = output
        self._queue_timeout_s = settings.queue_timeout_s
        self._next_try_s = 0.0  # of a request while stalled
        self._stalled_since_s: float | None = None
        self.waiting = 0
        self.most_running = settings.max_batch_size
        self.preempted_s = float("-inf")
        self.stall_reason = ""

    @property
    def stalled_s(self) -> float:
        """Seconds for which requests have waited while nothing ran; from any thread."""
        since_s = self._stalled_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def note_turn(self, *, ran: bool) -> None:
        """At the end of each turn: whether the model was run."""
        if ran or not len(self._queue):
            self._stalled_since_s, self.stall_reason = None, ""
        elif self._stalled_since_s is None:
            self._stalled_since_s = self._clock()

    def admit_next(self) -> None:
        """Reject what has waited too long, and admit the next request if it fits.

        That is the first of the queue that does not wait for its own floor. Where nothing has
        run for `_STALLED_S`, all are tried, the shortest first. None is admitted before the last
        prompt that was read is kept, since it may begin as that does.
        """
        self._reject_late()
        self._kept.release_ended()
        self.waiting = len(self._queue)
        batch = self._batch
        unkept = any(sequence.unkept for sequence in batch.decoding)
        if unkept or batch.prefilling is not None or len(batch.decoding) >= self.most_running:
            return
        if self.stalled_s >= _STALLED_S:
            self._admit_any()
            return
        if batch.decoding and self._clock() - self.preempted_s < self._headroom.hold_s:
            return  # a request was preempted just now
        sequence = next(filter(self._within_own_floor, self._queue.waiting), None)
        if sequence is not None:
            self._admit(sequence, batch.chunk_tokens)

    def _admit_any(self) -> None:
        """Admit the shortest request that fits alone, in the largest chunks with which it does."""
        if self._clock() < self._next_try_s:
            return
        self._next_try_s = self._clock() + _STALLED_S
        if long := self.stalled_s >= _LONG_STALL_S:
            self._controller.forget_margin()
        waiting = sorted(self._queue.waiting, key=lambda each: each.handle.final_tokens)
        chunks = [max(1, self._batch.chunk_tokens // parts) for parts in _CHUNK_PARTS]
        tries = [(sequence, size) for sequence in waiting[:1] for size in chunks]
        tries += [(sequence, chunks[-1]) for sequence in waiting[1:]]
        for sequence, chunk_tokens in tries:
            if self._admit(sequence, chunk_tokens, stalled=True):
                return
        if long and len(self._queue):
            self._note_stall()

    def _admit(self, sequence: TokenSequence, chunk_tokens: int, *, stalled: bool = False) -> bool:
        """Begin to prefill a request if it fits with all that runs; reject one that never fits."""
        batch = self._batch
        kept_tokens = self._kept.match(sequence).tokens
        unread = sequence.known_tokens - kept_tokens
        shape = batch.shape_of(batch.decoding, sequence, -(-unread // chunk_tokens))
        tokens = min(unread, chunk_tokens)
        asked = replace(
            batch.snapshot(prefill=False),
            joined=shape,
            next_pass=PassSize(tokens, tokens + kept_tokens),
            request=sequence,
            waiting=self.waiting - 1,
            stalled=stalled,
        )
        if isinstance(self._controller.act(asked, self._kept), Admit):
            self._queue.remove(sequence)
            self._controller.new_chunk()
            taken = batch.prefill(sequence, chunk_tokens)
            self._output.counters.kept_tokens += taken.tokens
            sequence.handle.emit(AdmitEvent(self._clock(), taken))
            return True
        if not batch.decoding and not self.could_ever_fit(shape):
            self._queue.remove(sequence)
            if sequence.handle.token_ids:  # no room for more of an answer that had begun
                self._output.end(sequence, "length")
                return False
            error = self.misfit(shape, expected=True)
            self._output.end(sequence, "error", str(error), rejection=rejection_of(error))
        return False

    def _within_own_floor(self, sequence: TokenSequence) -> bool:
        """Whether a request could run alone now, unless it has no floor of its own."""
        if sequence.handle.params.max_delta_nll is None:
            return True
        budget = self._monitor.budget_bytes
        if budget > sequence.unfit_bytes:
            if self._chooser.could_fit(self._batch.shape_of([], sequence), budget):
                return True
            sequence.unfit_bytes = budget
        return False

    # What can never run, and why

    def could_ever_fit(self, shape: BatchShape) -> bool:
        """Whether a batch fits the largest budget so far, or the source's limit; any thread.

        The safety margin is left out: it is forgotten where it keeps requests from running.
        """
        return self._chooser.could_fit(shape, self._monitor.budget_limit_bytes())

    def nothing_fits(self) -> str:
        """Why not even a request of one token fits now; empty if it does. From any thread."""
        budget = self._monitor.budget_now_bytes()
        reserve = self._monitor.usable_reserve_bytes - self._monitor.borrowed_bytes
        if self._chooser.could_fit(_ONE_TOKEN, budget + reserve):
            return ""
        return (
            f"No plan{self._chooser.floor_clause(_ONE_TOKEN)} fits a request of one token into "
            f"the budget of {human_bytes(max(0, budget))}; {_MORE}."
        )

    def misfit(self, shape: BatchShape, *, expected: bool) -> InfeasibleBudgetError:
        """The error that says why a batch does not fit with nothing else running.

        It is a `QualityFloorError` if plans fit, but none that is allowed. Any thread may
        call it.

        Args:
            shape: A batch that does not fit.
            expected: Whether it is the largest expected budget in which it does not, else the
                present one.
        """
        chooser, monitor = self._chooser, self._monitor
        budget = monitor.budget_limit_bytes() if expected else monitor.budget_bytes
        message = (
            f"{shape.seq_len_tokens} tokens do not fit the {'largest expected ' * expected}budget "
            f"of {max(0, budget):,} bytes under any plan{chooser.floor_clause(shape)}"
        )
        rise = chooser.least_rise(shape, budget)
        remedy = "shorten the prompt or ask for fewer tokens"
        if not chooser.could_fit(_ONE_TOKEN, budget):
            remedy = f"not even one token fits: {_MORE}"
        if rise is None or chooser.could_fit(shape, budget):
            return InfeasibleBudgetError(f"{message}; {remedy}.")
        return QualityFloorError(f"{message}: the best plan that fits has {rise:.4g}; {remedy}.")

    def _reject_late(self) -> None:
        """Reject the requests that have waited too long; the reason may be their floor."""
        timeout_s = self._queue_timeout_s
        if timeout_s is None:
            return
        oldest_s = self._clock() - timeout_s
        for sequence in self._queue.remove_if(lambda waiting: waiting.queued_since_s < oldest_s):
            shape = self._batch.shape_of([], sequence)
            message = f"The request waited longer than {timeout_s} s."
            rejection: Rejection = "queue_timeout"
            if not self._chooser.could_fit(shape, self._monitor.budget_bytes):
                error = self.misfit(shape, expected=False)
                message = f"{message} {error}"
                if isinstance(error, QualityFloorError):
                    rejection = "below_floor"
            self._output.end(sequence, "error", message, rejection=rejection)

    def _note_stall(self) -> None:
        """After nothing that waits fitted, and nothing runs: log why, once."""
        if self.stall_reason:
            return
        monitor = self._monitor
        self.stall_reason = (
            f"{counted(len(self._queue), 'request')} cannot run now: of the budget of "
            f"{human_bytes(max(0, monitor.budget_bytes))} (and "
            f"{human_bytes(monitor.usable_reserve_bytes)} of the reserve), "
            f"{human_bytes(monitor.used_bytes)} are used and "
            f"{human_bytes(monitor.margin.bytes)} are a margin."
        )
        log.warning("%s", self.stall_reason)

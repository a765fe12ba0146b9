"""The engine's scheduler: which requests are admitted, preempted and run in each turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from rap_env.errors import QualityFloorError
from rap_env.models.device import synchronise
from rap_env.models.live.interruption import PassInterruptedError
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.runtime.batch_shape import BatchShape, PassSize
from rap_env.runtime.metrics import Counters, StepKind, StepRecord
from rap_env.runtime.request_handle import AdmitEvent, Rejection, rejection_of
from rap_env.runtime.request_queue import RequestQueue
from rap_env.runtime.sequence import OutputProcessor, PrefillingSequence, TokenSequence, shape_of

if TYPE_CHECKING:
    from rap_env.models.caches.kv_cache import Restore
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

_NEW_SHARE = 0.1  # of the last step in the average time of a step
_LOOK_S = 0.02  # between looks at the budget within a prefill chunk
_MOST_INTERRUPTIONS = 3  # of one chunk; with a budget that jumps, it would never end
_STALLED_S = 1.0
"""Seconds without a pass, while requests wait, after which any of them that fits alone is tried."""
_SMALL_CHUNKS = 8  # of a request tried then, where others have one: its passes take less memory


class Scheduler:
    """Runs sequences on a live model, within its budget. For one thread; settings as of `Engine`.

    Attributes:
        counters: Totals of requests and tokens.
        output: Delivers tokens and ends to request handles.
        plan: The plan of the last turn.
        paused: Sequences that are put aside until their handles are no longer paused.
        observers: Called with a `StepRecord` after each pass.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        controller: RuntimeController,
        queue: RequestQueue,
        clock: Callable[[], float],
        *,
        max_batch_size: int,
        chunk_tokens: int,
        restore: Restore,
        queue_timeout_s: float | None,
    ) -> None:
        self._llm = llm
        self._controller = controller
        self._queue = queue
        self._clock = clock
        self._max_batch_size = max_batch_size
        self._most_running = max_batch_size  # fewer for a while where memory ran out
        self._chunk_tokens = chunk_tokens
        self._restore: Restore = restore
        self._queue_timeout_s = queue_timeout_s
        windows = controller.estimator.memory.facts.kv_window_tokens
        self._uniform = any(window is not None for window in windows)
        self._batch = self._new_batch()
        self._decoding: list[TokenSequence] = []  # row by row of the batch
        self._prefilling: PrefillingSequence | None = None
        self.paused: list[TokenSequence] = []
        self._shape: BatchShape | None = None  # of all that runs; None: to be computed
        self._preempted_s = float("-inf")
        self._decode_s = 0.0  # of a step, as a moving average
        self._next_look_s = 0.0
        self._interruptions = 0  # of the chunk that is next
        self._stalled_since_s: float | None = None
        self._next_try_s = 0.0  # of a request while stalled
        self.counters = Counters()
        self.output = OutputProcessor(clock, self.counters)
        self.plan = llm.plan
        self.observers: list[Callable[[StepRecord], None]] = []

    @property
    def running(self) -> list[TokenSequence]:
        """The sequences that decode, and the one in prefill, if any."""
        prefilling = self._prefilling
        return [*self._decoding, *([prefilling.sequence] if prefilling else [])]

    def turn(self) -> bool:
        """Run one turn; return whether the model was run."""
        self._put_aside()
        self._remove_ended()
        self._controller.note_waiting(len(self._queue))
        self._admit_next()
        self._make_fit(prefill=True)
        prefilled = self._prefilling is not None
        if self._prefilling is not None:
            self._prefill(self._prefilling)
            self._make_fit()  # the budget may have changed since
        decoded = bool(self._decoding)
        if decoded:
            self._decode()
        self.plan = self._llm.plan
        if prefilled or decoded or not len(self._queue):
            self._stalled_since_s = None
        elif self._stalled_since_s is None:
            self._stalled_since_s = self._clock()
        return prefilled or decoded

    @property
    def stalled_s(self) -> float:
        """Seconds for which requests have waited while nothing ran; from any thread."""
        since_s = self._stalled_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def shortest_wait_s(self) -> float:
        """Seconds of decoding until a running request has all of its tokens; 0 if nothing runs."""
        handles = (sequence.handle for sequence in self.running)
        to_come = (handle.params.max_new_tokens - len(handle.token_ids) for handle in handles)
        return min(to_come, default=0) * self._decode_s

    def check_feasible(self, sequence: TokenSequence) -> None:
        """Raise `InfeasibleBudgetError` if no plan can ever fit a sequence; from any thread."""
        shape = shape_of([], sequence, uniform=self._uniform)
        if not self._controller.could_fit(shape):
            raise self._controller.misfit(shape, expected=True)

    def warm_up(self, tokens: int) -> None:
        """Run a prompt of `tokens` dummies, so that the controller learns what steps take."""
        shape = BatchShape(1, tokens + 1)
        first = PassSize(tokens, tokens)
        if self.running or not self._controller.admit(shape, next_pass=first):
            return
        batch = self._new_batch()
        batch.prefill([[0] * tokens])
        self._controller.observe(shape, "prefill")
        batch.extend([0])
        self._controller.observe(shape, "decode")
        batch.close()

    def drop_all(self) -> None:
        """Free all rows and drop their sequences."""
        self._drop_prefill()
        self._batch.close()
        self._batch = self._new_batch()
        self._decoding = []

    # Passes through the model

    def _prefill(self, prefilling: PrefillingSequence) -> None:
        began, started = self._clock(), time.perf_counter()
        try:
            with self._llm.exclusive():
                plan = self._llm.plan
                logits, count = prefilling.advance()
                synchronise(*self._llm.devices)
            self._interruptions = 0
            seconds = time.perf_counter() - started
            length = prefilling.batch.length
            self.counters.prompt_tokens += count
            prefilling.sequence.handle.note_plan(plan, self._clock())
            if logits is not None:
                self.output.deliver_prompt(prefilling)
                if self.output.deliver([prefilling.sequence], logits, plan)[0]:
                    self._reserve([*self._decoding, prefilling.sequence])
                    self._batch.join(prefilling.batch)
                    self._decoding.append(prefilling.sequence)
                self._drop_prefill()
        except PassInterruptedError:
            self._interruptions += 1
            self.counters.interruptions += 1
            return
        except torch.OutOfMemoryError as error:
            self._start_again("prefill", error)
            return
        except Exception as error:
            self.output.fail([prefilling.sequence], error)
            self._drop_prefill()
            if self._batch.size != len(self._decoding):  # it failed while joining the batch
                self.output.fail(self._decoding, error)
                self.drop_all()
            return
        self._record(began, seconds, "prefill", 1, length, plan)

    def _must_interrupt(self) -> bool:
        """Whether a prefill chunk is to end at once: the budget has fallen below what is used."""
        now = time.perf_counter()
        if now < self._next_look_s or self._interruptions >= _MOST_INTERRUPTIONS:
            return False
        self._next_look_s = now + _LOOK_S
        return self._controller.monitor.exceeds_lower_budget()

    def _decode(self) -> None:
        began, started = self._clock(), time.perf_counter()
        sequences = self._decoding
        try:
            with self._llm.exclusive():
                plan = self._llm.plan
                logits = self._batch.extend([s.handle.token_ids[-1] for s in sequences])
                synchronise(*self._llm.devices)
            seconds = time.perf_counter() - started
            length = self._batch.length
            continues = self.output.deliver(sequences, logits, plan)
            if not all(continues):
                self._most_running = self._max_batch_size
                self._keep([row for row, stays in enumerate(continues) if stays])
        except torch.OutOfMemoryError as error:
            self._start_again("decode", error)
            return
        except Exception as error:
            self.output.fail(sequences, error)
            self.drop_all()
            return
        self._decode_s += _NEW_SHARE * (seconds - self._decode_s) if self._decode_s else seconds
        self._record(began, seconds, "decode", len(sequences), length, plan)

    def _record(
        self,
        began: float,
        seconds: float,
        kind: StepKind,
        rows: int,
        length: int,
        plan: Plan,
    ) -> None:
        prefilling = 0 if self._prefilling is None else self._prefilling.batch.size
        longest = max(length, self._batch.length)
        shape = BatchShape(max(rows, self._batch.size + prefilling), longest)
        peak = self._controller.observe(shape, kind)
        record = StepRecord(
            time_s=began,
            duration_s=seconds,
            kind=kind,
            rows=rows,
            length=length,
            plan=plan,
            held=self._controller.monitor.held,
            peak_bytes=peak,
            budget_bytes=self._controller.monitor.budget_bytes,
        )
        for observer in self.observers:
            observer(record)

    # Admission and preemption

    def _running_shape(self) -> BatchShape:
        if self._shape is None:
            joining, chunks = None, 0
            if self._prefilling is not None:
                joining, chunks = self._prefilling.sequence, self._prefilling.chunks_left
            self._shape = shape_of(self._decoding, joining, chunks, uniform=self._uniform)
        return self._shape

    def _make_fit(self, prefill: bool = False) -> None:
        """Lower the plan, or preempt, until the next pass fits."""
        while True:
            next_pass = self._pass_size(self._prefilling if prefill else None)
            if self._controller.check(self._running_shape(), next_pass) or not self._preempt():
                return

    def _pass_size(self, prefilling: PrefillingSequence | None) -> PassSize:
        """The size of the next pass: a prefill chunk, or a decode step."""
        rows, length = self._batch.size, self._batch.length
        if prefilling is None:
            return PassSize(rows, rows, prefills=self._prefilling is not None)
        tokens = growth = prefilling.next_tokens
        if prefilling.chunks_left == 1 and rows:  # it joins the batch, which pads shorter rows
            final = prefilling.batch.length + tokens
            growth = (rows + 1) * max(length, final) - rows * length - prefilling.batch.length
        return PassSize(tokens, growth)

    def _preempt(self) -> bool:
        """Move the newest request to the front of the queue; False if nothing runs."""
        if self._prefilling is not None:
            sequence = self._prefilling.sequence
            self._drop_prefill()
        elif self._decoding:
            sequence = self._decoding[-1]
            self._keep(list(range(len(self._decoding) - 1)))
        else:
            return False
        self._put_back([sequence])
        self._controller.note_preemption()
        return True

    def _start_again(self, kind: StepKind, error: torch.OutOfMemoryError) -> None:
        """Put back into the queue what a pass without enough memory has damaged; alone, it fails.

        After a decode step that is all that runs, because caches may be half written. Until a
        request ends, fewer run at a time than did.
        """
        running = [sequence for sequence in self.running if sequence.handle.reason is None]
        if len(running) == 1:
            self.output.fail(running, error)
        if kind == "prefill" and self._batch.size == len(self._decoding) > 0:
            self._preempt()
        else:
            self.drop_all()
            self._put_back(running if len(running) > 1 else [])
        self._controller.note_out_of_memory(kind)
        if len(running) > 1:
            log.warning("Memory ran out with %d requests; fewer run together now.", len(running))
            self._most_running = len(running) - 1

    def _put_back(self, sequences: Sequence[TokenSequence]) -> None:
        """Put sequences that ran at the front of the queue, in their order."""
        self._preempted_s = self._clock()
        for sequence in reversed(sequences):
            sequence.preempt(self._preempted_s)
            self.counters.preemptions += 1
            self._queue.put_first(sequence)

    def _admit_next(self) -> None:
        """Admit the first request of the queue that does not wait for its own floor, if it fits.

        Where nothing has run for `_STALLED_S`, all are tried, the shortest first.
        """
        if self._prefilling is not None or len(self._decoding) >= self._most_running:
            return
        if self.stalled_s >= _STALLED_S:
            self._admit_any()
            return
        if self._decoding and self._clock() - self._preempted_s < self._controller.hold_s:
            return  # a request was preempted just now
        sequence = self._queue.first_of(self._within_own_floor)
        if sequence is None:
            return
        self._admit(sequence, self._chunk_tokens)

    def _admit_any(self) -> None:
        """Admit the shortest request that fits alone, without a learned margin, in small chunks."""
        if self._clock() < self._next_try_s:
            return
        self._next_try_s = self._clock() + _STALLED_S / 2
        self._controller.forget_margin()
        chunk_tokens = max(1, self._chunk_tokens // _SMALL_CHUNKS)
        waiting = sorted(self._queue.waiting, key=lambda each: each.handle.final_tokens)
        for sequence in waiting:
            if self._admit(sequence, chunk_tokens, stalled=True):
                return
        if len(self._queue):
            self._controller.note_stall(shape_of([], waiting[0], uniform=self._uniform))

    def _admit(self, sequence: TokenSequence, chunk_tokens: int, *, stalled: bool = False) -> bool:
        """Begin to prefill a request if it fits with all that runs; reject one that never fits."""
        chunks = -(-sequence.known_tokens // chunk_tokens)
        shape = shape_of(self._decoding, sequence, chunks, uniform=self._uniform)
        tokens = min(sequence.known_tokens, chunk_tokens)
        first = PassSize(tokens, tokens)
        if self._controller.admit(shape, self._running_shape(), first, stalled=stalled):
            self._queue.remove(sequence)
            sequence.handle.emit(AdmitEvent(self._clock()))
            self._prefilling = PrefillingSequence(
                sequence, self._llm, self._restore, chunk_tokens, self._must_interrupt
            )
            self._interruptions = 0
            if not self._decoding:  # it starts the batch, else it will be copied into it
                self._prefilling.batch.reserve_tokens = sum(sequence.progress(in_batch=False))
            self._shape = shape
            return True
        if not self._decoding and self._controller.never_fits(shape):
            self._queue.remove(sequence)
            error = self._controller.misfit(shape, expected=True)
            self.output.reject(sequence, rejection_of(error), str(error))
        return False

    def _within_own_floor(self, sequence: TokenSequence) -> bool:
        """Whether a request could run alone now, unless it has no floor of its own."""
        if sequence.handle.max_delta_nll is None:
            return True
        monitor = self._controller.monitor
        limit = monitor.budget_bytes - monitor.margin.bytes
        if limit > sequence.unfit_bytes:
            shape = shape_of([], sequence, uniform=self._uniform)
            if self._controller.could_fit_in(shape, monitor.budget_bytes):
                return True
            sequence.unfit_bytes = limit
        return False

    def _reject_waiting(self, sequence: TokenSequence, message: str) -> None:
        """Reject a request that has waited too long, and say so if that is due to its floor."""
        shape = shape_of([], sequence, uniform=self._uniform)
        clause = self._controller.chooser.clause_for(shape)
        rejection: Rejection = "queue_timeout"
        budget = self._controller.monitor.budget_bytes
        if clause and not self._controller.could_fit_in(shape, budget):
            error = self._controller.misfit(shape, expected=False)
            message += f" {error}"
            if isinstance(error, QualityFloorError):
                rejection = "below_floor"
        elif clause:
            message += f" Only plans{clause} are used."
        self.output.reject(sequence, rejection, message)

    def _put_aside(self) -> None:
        """Put paused requests aside, and those that are no longer paused back into the queue."""
        for sequence in [sequence for sequence in self.paused if not _is_paused(sequence)]:
            self.paused.remove(sequence)
            sequence.queued_since_s = self._clock()
            self._queue.put_first(sequence)
        paused = [sequence for sequence in self.running if _is_paused(sequence)]
        if paused:
            if self._prefilling is not None and self._prefilling.sequence in paused:
                self._drop_prefill()
            rows = enumerate(self._decoding)
            self._keep([row for row, sequence in rows if sequence not in paused])
            self._controller.note_preemption()
        self.paused += [*paused, *self._queue.remove_if(_is_paused)]

    def _remove_ended(self) -> None:
        """Remove cancelled requests, and those that have waited too long."""
        for sequence in self._queue.remove_if(lambda waiting: waiting.handle.cancelled):
            self.output.end(sequence, "cancelled")
        timeout_s = self._queue_timeout_s
        if timeout_s is not None:
            oldest_s = self._clock() - timeout_s
            for sequence in self._queue.remove_if(lambda w: w.queued_since_s < oldest_s):
                self._reject_waiting(sequence, f"The request waited longer than {timeout_s} s.")
        if self._prefilling is not None and self._prefilling.sequence.handle.cancelled:
            self.output.end(self._prefilling.sequence, "cancelled")
            self._drop_prefill()
        cancelled = [sequence for sequence in self._decoding if sequence.handle.cancelled]
        if cancelled:
            rows = enumerate(self._decoding)
            self._keep([row for row, sequence in rows if sequence not in cancelled])
            for sequence in cancelled:
                self.output.end(sequence, "cancelled")

    def _new_batch(self) -> LiveBatch:
        return LiveBatch(self._llm, restore=self._restore, most_tokens=self._chunk_tokens)

    def _keep(self, rows: list[int]) -> None:
        kept = [self._decoding[row] for row in rows]
        self._reserve(kept)
        self._batch.keep(rows)
        self._decoding, self._shape = kept, None

    def _reserve(self, sequences: Sequence[TokenSequence]) -> None:
        """Let the batch of these sequences have room until the first of them ends."""
        progress = [sequence.progress(in_batch=True) for sequence in sequences]
        if progress:
            cached, to_come = zip(*progress, strict=True)
            self._batch.reserve_tokens = max(cached) + min(to_come)

    def _drop_prefill(self) -> None:
        if self._prefilling is not None:
            self._prefilling.batch.close()
        self._prefilling = self._shape = None


def _is_paused(sequence: TokenSequence) -> bool:
    return sequence.handle.paused and not sequence.handle.cancelled

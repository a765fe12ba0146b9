"""The engine's scheduler: which requests are admitted, preempted and run in each turn."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rap_env.models.caches.kv_cache import PassInterruptedError
from rap_env.models.device import synchronise
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.runtime.admission import Admission, RequestQueue
from rap_env.runtime.decision import CachedRow, EndRefill, Preempt, Refill
from rap_env.runtime.kept_sequences import KeptFiles, KeptSequences
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.plan_chooser import KeptQuality
from rap_env.runtime.records import Counters, EngineSettings, StepKind, StepRecord
from rap_env.runtime.request_handle import OutputProcessor, TokenSequence
from rap_env.runtime.running import PrefillingSequence, RunningBatch

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

_REFILL_S = 0.1  # between looks for a row whose cache should be computed again
_NEW_SHARE = 0.1  # of the last step in the average time of a step
_LEAST_SHARE = 1.0
"""Time that a decode step gives to prompts, as a share of its own, if the target leaves less:
half of all time. Otherwise requests would wait without end on a machine that misses the
target."""


class Pace:
    """Decode steps between two prompt chunks, so that tokens keep coming at a target rate.

    A chunk takes as long as many decode steps. With a target of t seconds between tokens,
    steps of d and a chunk of c, ``c / (t - d)`` steps follow the chunk before the next one.
    The longest time between two tokens is that of a chunk in any case; smaller chunks shorten
    it.

    Args:
        target_itl_s: Mean seconds between the tokens of an answer while prompts are read;
            None for one step between two chunks.

    Attributes:
        decode_s: Seconds of a decode step, as a moving average; 0 before the first one.
    """

    def __init__(self, target_itl_s: float | None) -> None:
        self._target_s = target_itl_s
        self._steps = 0
        self.decode_s = 0.0

    @property
    def decodes_first(self) -> bool:
        """Whether decode steps are due before the next chunk."""
        return self._steps > 0

    def note_chunk(self, seconds: float, waiting: int = 0) -> None:
        """A prompt chunk has taken so long; one of the steps follows it in the same turn.

        Args:
            seconds: What it took.
            waiting: Requests that have not begun: the target is 1 + `waiting` times as long.
        """
        if self._target_s is not None and self.decode_s:
            spare_s = self._target_s * (1 + waiting) - self.decode_s
            self._steps = math.ceil(seconds / max(spare_s, _LEAST_SHARE * self.decode_s))

    def note_step(self, seconds: float) -> None:
        """A decode step has taken so long."""
        self._steps = max(0, self._steps - 1)
        self.decode_s += _NEW_SHARE * (seconds - self.decode_s) if self.decode_s else seconds


def kept_sequences(controller: RuntimeController, settings: EngineSettings) -> KeptSequences:
    """An empty store of what is read, in files too where a disk may be used."""
    llm, file_bytes = controller.llm, settings.keep_file_bytes
    uses_disk = llm.residency == "offload" or file_bytes > 0
    files = KeptFiles(cache_dir() if uses_disk else None, file_bytes)
    quality = KeptQuality(llm, controller.chooser, settings.keep_delta_nll, controller.clock)
    return KeptSequences(llm, controller.monitor, quality, files, keep=settings.keep)


class Scheduler:
    """Runs sequences on a live model, within its budget. For one thread.

    Attributes:
        admission: Lets requests begin, and says why some cannot.
        batch: What runs.
        counters: Totals of requests and tokens.
        output: Delivers tokens and ends to request handles.
        plan: The plan of the last turn.
        observers: Called with a `StepRecord` after each pass.
    """

    def __init__(
        self, controller: RuntimeController, queue: RequestQueue, settings: EngineSettings
    ) -> None:
        self._llm: ElasticLLM = controller.llm
        self._controller = controller
        self._queue = queue
        self._clock = controller.clock
        self._max_batch_size = settings.max_batch_size
        self._pace = Pace(settings.target_itl_s)
        self._kept = kept_sequences(controller, settings)
        self.batch = RunningBatch(controller, self._kept, settings.prefill_chunk_tokens)
        self._next_refill_s = float("-inf")
        self.counters = Counters()
        self.output = OutputProcessor(self._clock, self.counters)
        self.admission = Admission(controller, queue, self.batch, self.output, settings)
        self.plan = self._llm.plan
        self.observers: list[Callable[[StepRecord], None]] = []

    def turn(self) -> bool:
        """Run one turn; return whether the model was run."""
        self._remove_cancelled()
        self._keep([sequence for sequence in self.batch.decoding if sequence.unkept])
        self.admission.admit_next()
        batch = self.batch
        self._make_fit(prefill=not self._pace.decodes_first or not batch.decoding)
        prefilled = batch.prefilling is not None and not (
            self._pace.decodes_first and batch.decoding
        )
        if prefilled:
            self._prefill()
            self._make_fit()  # the budget may have changed since
        decoded = bool(batch.decoding)
        if decoded:
            self._decode()
        self.plan = self._llm.plan
        self.admission.note_turn(ran=prefilled or decoded)
        return prefilled or decoded

    def check_feasible(self, sequence: TokenSequence) -> None:
        """Raise `InfeasibleBudgetError` if no plan can ever fit a sequence; from any thread."""
        shape = self.batch.shape_of([], sequence)
        if not self.admission.could_ever_fit(shape):
            raise self.admission.misfit(shape, expected=True)

    def drop_all(self) -> None:
        """Free all rows and drop their sequences."""
        self.batch.clear()
        self._kept.close()

    # Passes through the model

    def _prefill(self) -> None:
        batch, prefilling = self.batch, self.batch.prefilling
        assert prefilling is not None
        began, started = self._clock(), time.perf_counter()
        try:
            with self._llm.exclusive():
                plan = self._llm.plan
                logits, count = prefilling.advance()
                synchronise(self._llm.device)
            self._controller.new_chunk()
            seconds = time.perf_counter() - started
            length = prefilling.batch.length
            self._pace.note_chunk(seconds, len(self._queue))
            if prefilling.refills:
                self.counters.refilled_tokens += count
            else:
                self._count(prefilling.sequence, length, count)
                self._kept.files.note_prefill(count, seconds)
                prefilling.sequence.handle.note_plan(plan, self._clock())
            if logits is not None:
                self._end_prefill(prefilling, logits)
        except PassInterruptedError:
            return
        except torch.OutOfMemoryError as error:
            self._start_again("prefill", error)
            return
        except Exception as error:
            if prefilling.refills and batch.intact:
                self._give_up_refill(error)
                return
            self.output.fail([prefilling.sequence], error)
            batch.drop_prefill()
            if not batch.intact:  # it failed while joining the batch
                self.output.fail(batch.decoding, error)
                batch.clear()
            return
        self._record(began, "prefill", 1, length, plan)

    def _end_prefill(self, prefilled: PrefillingSequence, logits: torch.Tensor) -> None:
        """Keep a prefilled sequence, and let it decode, unless its first token ends it."""
        sequence = prefilled.sequence
        if not prefilled.refills:
            continues = self.output.deliver([sequence], logits, prefilled.batch.plans)[0]
            self._keep([sequence])
            if not continues:
                self.batch.drop_prefill()
        self.batch.join()

    def _give_up_refill(self, error: Exception) -> None:
        """Go on with the cache that a sequence has, after its refill failed."""
        if refilling := self.batch.refilling:
            log.warning("A cache could not be computed again: %s", error)
            refilling.sequence.refills = False
            self.batch.drop_prefill()

    def _count(self, sequence: TokenSequence, cached: int, new: int) -> None:
        """Count `new` prefilled tokens, of which some may have been computed before."""
        self.counters.prompt_tokens += new
        again = max(0, min(new, sequence.computed_tokens - (cached - new)))
        self.counters.repeated_tokens += again
        sequence.computed_tokens = max(sequence.computed_tokens, cached)

    def _decode(self) -> None:
        began, started = self._clock(), time.perf_counter()
        batch, sequences = self.batch, self.batch.decoding
        try:
            with self._llm.exclusive():
                plan = self._llm.plan
                logits = batch.rows.extend([s.handle.token_ids[-1] for s in sequences])
                synchronise(self._llm.device)
            seconds = time.perf_counter() - started
            length = batch.rows.length
            plans = batch.rows.plans
            for sequence, own in zip(sequences, plans, strict=True):
                sequence.computed_tokens = max(sequence.computed_tokens, sequence.known_tokens)
                sequence.read.note(sequence.known_tokens, own)
            continues = self.output.deliver(sequences, logits, plans)
            batch.note_tokens()
            if not all(continues):
                self.admission.most_running = self._max_batch_size
                pairs = zip(sequences, continues, strict=True)
                ended = [sequence for sequence, stays in pairs if not stays]
                self._keep(ended)
                batch.remove(ended)
        except torch.OutOfMemoryError as error:
            self._start_again("decode", error)
            return
        except Exception as error:
            self.output.fail(sequences, error)
            batch.clear()
            return
        self._pace.note_step(seconds)
        self._record(began, "decode", len(sequences), length, plan)

    def _record(
        self,
        began: float,
        kind: StepKind,
        rows: int,
        length: int,
        plan: Plan,
    ) -> None:
        batch = self.batch
        self._kept.quality.note_pass(plan)
        prefilling = 0 if batch.prefilling is None else batch.prefilling.batch.size
        longest = max(length, batch.rows.length)
        shape = BatchShape(max(rows, batch.rows.size + prefilling), longest)
        with self._controller.timed():
            peak = self._controller.monitor.observe_step(shape, kind)
        record = StepRecord(
            time_s=began,
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

    def _make_fit(self, *, prefill: bool = False) -> None:
        """Act until the next pass fits: lower the plan, refill a row or end that, or preempt."""
        batch, waiting = self.batch, self.admission.waiting
        while True:
            asked = replace(batch.snapshot(prefill=prefill), waiting=waiting)
            asked = replace(asked, refillable=self._refillable())
            action = self._controller.act(asked, self._kept)
            if isinstance(action, Refill):
                batch.prefill(action.row, batch.chunk_tokens, refills=True)
            elif isinstance(action, EndRefill):
                batch.drop_prefill()
            elif isinstance(action, Preempt):
                self._preempt(action.row)
            else:
                return

    def _preempt(self, sequence: TokenSequence) -> None:
        """Move a request that runs to the front of the queue."""
        self.batch.preempt(sequence)
        self._put_back([sequence])
        with self._controller.timed():
            self._controller.monitor.trim()

    def _start_again(self, kind: StepKind, error: torch.OutOfMemoryError) -> None:
        """Put back into the queue what a pass without enough memory has damaged; alone, it fails.

        After a decode step that is all that runs, because caches may be half written. Until a
        request ends, fewer run at a time than did.
        """
        if kind == "prefill" and self.batch.refilling and self.batch.intact:
            self._give_up_refill(error)
            self._note_out_of_memory(kind)
            return
        running = [sequence for sequence in self.batch.sequences if sequence.handle.reason is None]
        if len(running) == 1:
            self.output.fail(running, error)
        if kind == "prefill" and self.batch.intact and self.batch.decoding:
            self._preempt(self.batch.newest)
        else:
            self.batch.clear()
            self._put_back(running if len(running) > 1 else [])
        self._note_out_of_memory(kind)
        if len(running) > 1:
            log.warning("Memory ran out with %d requests; fewer run together now.", len(running))
            self.admission.most_running = len(running) - 1

    def _note_out_of_memory(self, kind: StepKind) -> None:
        with self._controller.timed():
            self._controller.monitor.observe_out_of_memory(kind)

    def _put_back(self, sequences: Sequence[TokenSequence]) -> None:
        """Put sequences that ran at the front of the queue, in their order."""
        now = self.admission.preempted_s = self._clock()
        for sequence in reversed(sequences):
            sequence.preempt(now)
            self.counters.preemptions += 1
            self._queue.put_first(sequence)

    def _refillable(self) -> tuple[CachedRow, ...]:
        """Rows whose caches may be computed again, where it is time to look for one."""
        now, batch = self._clock(), self.batch
        if now < self._next_refill_s or batch.prefilling is not None or not batch.decoding:
            return ()
        self._next_refill_s = now + _REFILL_S
        return batch.refillable()

    def _remove_cancelled(self) -> None:
        """Remove cancelled requests."""
        for sequence in self._queue.remove_if(lambda waiting: waiting.handle.cancelled):
            self.output.end(sequence, "cancelled")
        cancelled = [sequence for sequence in self.batch.sequences if sequence.handle.cancelled]
        if cancelled:
            for sequence in cancelled:
                self.output.end(sequence, "cancelled")
            self._keep([each for each in cancelled if each in self.batch.decoding])
            self.batch.remove(cancelled)

    def _keep(self, sequences: Sequence[TokenSequence]) -> None:
        """Keep what sequences have cached, unless their logits were not finite."""
        try:
            for sequence in sequences:
                if sequence.handle.reason != "error":
                    self.batch.keep(sequence)
        except Exception:
            log.exception("What was read could not be kept.")

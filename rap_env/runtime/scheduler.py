"""The engine's turns: who joins, who leaves, and which passes through the model are made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.errors import EngineClosedError, InfeasibleBudgetError, QueueFullError
from rap_env.llm.live_batch import LiveBatch
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.metrics import Metrics, StepKind, StepRecord
from rap_env.runtime.sequence import PrefillingSequence, TokenSequence, shape_of

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.live import Restore
    from rap_env.runtime.controller import RuntimeController


class RequestQueue:
    """First come, first served; thread-safe.

    Args:
        longest: How many may wait. Those that were sent back to the front always may.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._jobs: deque[TokenSequence] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def append(self, sequence: TokenSequence) -> None:
        """Queue up.

        Raises:
            QueueFullError: Too many wait.
            EngineClosedError: The line is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed and takes no more requests.")
            if len(self._jobs) >= self._longest:
                raise QueueFullError(
                    f"{len(self._jobs)} requests wait already, the most that may; try again later."
                )
            self._jobs.append(sequence)

    def put_first(self, sequence: TokenSequence) -> None:
        """Queue up at the front."""
        with self._lock:
            self._jobs.appendleft(sequence)

    def first(self) -> TokenSequence | None:
        """Who is next, left in line."""
        with self._lock:
            return self._jobs[0] if self._jobs else None

    def leave(self, sequence: TokenSequence) -> None:
        """Take somebody out of the line."""
        with self._lock:
            self._jobs.remove(sequence)

    def remove_if(self, unwanted: Callable[[TokenSequence], bool]) -> list[TokenSequence]:
        """Take all out for whom something holds, and return them."""
        if not self._jobs:
            return []
        with self._lock:
            out = [sequence for sequence in self._jobs if unwanted(sequence)]
            if out:
                self._jobs = deque(sequence for sequence in self._jobs if sequence not in out)
        return out

    def close(self) -> list[TokenSequence]:
        """Let nobody in any more, and return those who wait."""
        with self._lock:
            self._closed = True
            out, self._jobs = list(self._jobs), deque()
        return out


class Scheduler:
    """A batch of sequences on a live model, within its budget. For one thread.

    Args:
        llm: The live model.
        controller: Keeps it within its budget.
        line: Where sequences wait.
        metrics: Takes tokens and ends.
        max_batch_size: As for `Engine`, and so are the next three.
        chunk_tokens: Most tokens of a prompt to run in one turn.
        restore: What a restored attention block does about earlier tokens.
        queue_timeout_s: Longest that a sequence may wait; None for no limit.
        clock: Gives the time in seconds.

    Attributes:
        sequences: Those that decode, row by row of the batch.
        prefilling: The one whose prompt is run, if any.
        mask: That of the last turn.
        observers: Called with a `StepRecord` after each pass.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        controller: RuntimeController,
        line: RequestQueue,
        metrics: Metrics,
        *,
        max_batch_size: int,
        chunk_tokens: int,
        restore: Restore,
        queue_timeout_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._controller = controller
        self._queue = line
        self._metrics = metrics
        self._max_batch_size = max_batch_size
        self._chunk_tokens = chunk_tokens
        self._restore: Restore = restore
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        windows = controller.estimator.memory.facts.kv_window_tokens
        self._uniform = any(window is not None for window in windows)
        self._batch = self._new_batch()
        self._shape: BatchShape | None = None  # of all that runs; None: to be counted anew
        self._preempted_s = float("-inf")
        self.sequences: list[TokenSequence] = []
        self.prefilling: PrefillingSequence | None = None
        self.mask = llm.mask
        self.observers: list[Callable[[StepRecord], None]] = []

    def turn(self) -> bool:
        """One turn; says whether the model was run."""
        self._drop_unwanted()
        self._take_newcomer()
        self._make_fit(prefill=True)
        prefilled = self.prefilling is not None
        if self.prefilling is not None:
            self._prefill(self.prefilling)
            self._make_fit()  # the budget may have moved meanwhile
        decoded = bool(self.sequences)
        if decoded:
            self._decode()
        self.mask = self._llm.mask
        return prefilled or decoded

    def check_feasible(self, sequence: TokenSequence) -> None:
        """Refuse a sequence that could never be served; from any thread.

        Raises:
            InfeasibleBudgetError: No mask fits it into the largest budget there has been.
        """
        shape = shape_of([], sequence, uniform=self._uniform)
        if not self._controller.could_fit(shape):
            raise InfeasibleBudgetError(self._never_fits(shape))

    def warm_up(self, tokens: int) -> None:
        """Run a prompt that nobody asked for, so that the controller learns what steps take.

        Args:
            tokens: Its length.
        """
        shape = BatchShape(1, tokens + 1)
        self._controller.expect(tokens, tokens)
        if self.sequences or self.prefilling is not None or not self._controller.admit(shape):
            return
        batch = self._new_batch()
        batch.prefill([[0] * tokens])
        self._controller.observe(shape, "prefill")
        batch.extend([0])
        self._controller.observe(shape, "decode")
        batch.close()

    def forget_all(self) -> None:
        """Free all rows, whoever they are of."""
        self._leave_newcomer()
        self._batch.close()
        self._batch = self._new_batch()
        self.sequences = []

    # Passes through the model

    def _prefill(self, prefilling: PrefillingSequence) -> None:
        began, started = self._clock(), time.perf_counter()
        try:
            with self._llm.exclusive():
                mask = self._llm.mask
                logits, count = prefilling.advance()
            seconds = time.perf_counter() - started
            length = prefilling.batch.length
            self._metrics.counters.prompt_tokens += count
            if logits is not None:
                if self._metrics.deliver([prefilling.sequence], logits, mask)[0]:
                    self._batch.join(prefilling.batch)
                    self.sequences.append(prefilling.sequence)
                self._leave_newcomer()
        except Exception as error:
            self._metrics.fail([prefilling.sequence], error)
            self._leave_newcomer()
            if self._batch.size != len(self.sequences):  # it broke while it joined
                self._metrics.fail(self.sequences, error)
                self.forget_all()
            return
        self._record(began, seconds, "prefill", 1, length, mask)

    def _decode(self) -> None:
        began, started = self._clock(), time.perf_counter()
        sequences = self.sequences
        try:
            with self._llm.exclusive():
                mask = self._llm.mask
                logits = self._batch.extend([sequence.pending for sequence in sequences])
            seconds = time.perf_counter() - started
            length = self._batch.length
            alive = self._metrics.deliver(sequences, logits, mask)
            if not all(alive):
                self._keep([row for row, stays in enumerate(alive) if stays])
        except Exception as error:
            self._metrics.fail(sequences, error)
            self.forget_all()
            return
        self._record(began, seconds, "decode", len(sequences), length, mask)

    def _record(
        self, began: float, seconds: float, kind: StepKind, rows: int, length: int, mask: BlockMask
    ) -> None:
        prefilling = 0 if self.prefilling is None else self.prefilling.batch.size
        most = max(length, self._batch.length)
        shape = BatchShape(max(rows, self._batch.size + prefilling), most)
        controller = self._controller
        peak = controller.observe(shape, kind)
        for observer in self.observers:
            observer(
                StepRecord(
                    time_s=began,
                    duration_s=seconds,
                    kind=kind,
                    rows=rows,
                    length=length,
                    mask=mask,
                    held=controller.held,
                    peak_bytes=peak,
                    budget_bytes=controller.budget_bytes,
                )
            )

    # Who runs

    def _never_fits(self, shape: BatchShape) -> str:
        most = self._controller.monitor.limit_bytes()
        return (
            f"{shape.seq_len_tokens} tokens fit no budget that can be counted on, the largest of "
            f"{most:,} bytes, whatever is removed; ask for less."
        )

    def _running_shape(self) -> BatchShape:
        if self._shape is None:
            prefilling = self.prefilling
            self._shape = shape_of(
                self.sequences,
                prefilling.sequence if prefilling else None,
                prefilling.steps_left if prefilling else 0,
                uniform=self._uniform,
            )
        return self._shape

    def _make_fit(self, prefill: bool = False) -> None:
        while True:
            self._expect(self.prefilling if prefill else None)
            if self._controller.check(self._running_shape()) or not self._preempt():
                return

    def _expect(self, prefilling: PrefillingSequence | None) -> None:
        """Tell the controller what the next pass will take: a prefilling's, or a decoding one."""
        rows, length = self._batch.size, self._batch.length
        if prefilling is None:
            self._controller.expect(rows, rows)
            return
        tokens, growth = prefilling.next_tokens, prefilling.next_tokens
        if prefilling.steps_left == 1 and rows:  # it joins then, and the shorter are padded
            final = prefilling.batch.length + tokens
            growth = (rows + 1) * max(length, final) - rows * length - prefilling.batch.length
        self._controller.expect(tokens, growth)

    def _preempt(self) -> bool:
        """Send the newest back to the front of the line; False if nobody runs."""
        if self.prefilling is not None:
            sequence = self.prefilling.sequence
            self._leave_newcomer()
        elif self.sequences:
            sequence = self.sequences[-1]
            self._keep(list(range(len(self.sequences) - 1)))
        else:
            return False
        sequence.handle.preemptions += 1
        sequence.waits_since_s = self._preempted_s = self._clock()
        self._metrics.counters.preemptions += 1
        self._queue.put_first(sequence)
        return True

    def _take_newcomer(self) -> None:
        sequence = self._queue.first()
        if (
            sequence is None
            or self.prefilling is not None
            or len(self.sequences) >= self._max_batch_size
        ):
            return
        if self.sequences and self._clock() - self._preempted_s < self._controller.hold_s:
            return  # somebody had to make room just now
        steps = -(-sequence.known_tokens // self._chunk_tokens)
        wanted = shape_of(self.sequences, sequence, steps, uniform=self._uniform)
        first = min(sequence.known_tokens, self._chunk_tokens)
        self._controller.expect(first, first)
        if self._controller.admit(wanted, self._running_shape()):
            self._queue.leave(sequence)
            self.prefilling = PrefillingSequence(
                sequence, self._llm, self._restore, self._chunk_tokens
            )
            self._shape = wanted
        elif not self.sequences and self._controller.never_fits(wanted):
            self._queue.leave(sequence)
            self._metrics.refuse(sequence, self._never_fits(wanted))

    def _drop_unwanted(self) -> None:
        for sequence in self._queue.remove_if(lambda sequence: sequence.handle.cancelled):
            self._metrics.end(sequence, "cancelled")
        if self._queue_timeout_s is not None:
            oldest = self._clock() - self._queue_timeout_s
            for sequence in self._queue.remove_if(lambda sequence: sequence.waits_since_s < oldest):
                self._metrics.refuse(sequence, f"It waited longer than {self._queue_timeout_s} s.")
        if self.prefilling is not None and self.prefilling.sequence.handle.cancelled:
            self._metrics.end(self.prefilling.sequence, "cancelled")
            self._leave_newcomer()
        gone = [sequence for sequence in self.sequences if sequence.handle.cancelled]
        if gone:
            self._keep(
                [
                    row
                    for row, sequence in enumerate(self.sequences)
                    if not sequence.handle.cancelled
                ]
            )
            for sequence in gone:
                self._metrics.end(sequence, "cancelled")

    def _new_batch(self) -> LiveBatch:
        return LiveBatch(self._llm, restore=self._restore, most_tokens=self._chunk_tokens)

    def _keep(self, rows: list[int]) -> None:
        sequences = [self.sequences[row] for row in rows]
        self._batch.keep(rows)
        self.sequences, self._shape = sequences, None

    def _leave_newcomer(self) -> None:
        if self.prefilling is not None:
            self.prefilling.batch.close()
        self.prefilling = self._shape = None

"""The engine's turns: who joins, who leaves, and which passes through the model are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.errors import InfeasibleBudgetError
from rap_env.llm.live_batch import LiveBatch
from rap_env.runtime.demand import Demand
from rap_env.runtime.jobs import Job, Newcomer, demand_of
from rap_env.runtime.line import WaitingLine
from rap_env.runtime.outcomes import Outcomes
from rap_env.runtime.records import StepKind, StepRecord

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.live import Restore
    from rap_env.runtime.controller import RuntimeController


class Turns:
    """A batch of jobs on a live model, within its budget. For one thread.

    Args:
        llm: The live model.
        controller: Keeps it within its budget.
        line: Where jobs wait.
        outcomes: Takes tokens and ends.
        max_batch_size: As for `Engine`, and so are the next three.
        chunk_tokens: Most tokens of a prompt to run in one turn.
        restore: What a restored attention block does about earlier tokens.
        queue_timeout_s: Longest that a job may wait; None for no limit.
        clock: Gives the time in seconds.

    Attributes:
        jobs: Those that decode, row by row of the batch.
        newcomer: The one whose prompt is run, if any.
        mask: That of the last turn.
        observers: Called with a `StepRecord` after each pass.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        controller: RuntimeController,
        line: WaitingLine,
        outcomes: Outcomes,
        *,
        max_batch_size: int,
        chunk_tokens: int,
        restore: Restore,
        queue_timeout_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._controller = controller
        self._line = line
        self._outcomes = outcomes
        self._max_batch_size = max_batch_size
        self._chunk_tokens = chunk_tokens
        self._restore: Restore = restore
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        windows = controller.needs.memory.facts.kv_window_tokens
        self._uniform = any(window is not None for window in windows)
        self._batch = self._new_batch()
        self._demand: Demand | None = None  # of all that runs; None: to be counted anew
        self._preempted_s = float("-inf")
        self.jobs: list[Job] = []
        self.newcomer: Newcomer | None = None
        self.mask = llm.mask
        self.observers: list[Callable[[StepRecord], None]] = []

    def turn(self) -> bool:
        """One turn; says whether the model was run."""
        self._drop_unwanted()
        self._take_newcomer()
        self._make_fit(prefill=True)
        prefilled = self.newcomer is not None
        if self.newcomer is not None:
            self._prefill(self.newcomer)
            self._make_fit()  # the budget may have moved meanwhile
        decoded = bool(self.jobs)
        if decoded:
            self._decode()
        self.mask = self._llm.mask
        return prefilled or decoded

    def check_feasible(self, job: Job) -> None:
        """Refuse a job that could never be served; from any thread.

        Raises:
            InfeasibleBudgetError: No mask fits it into the largest budget there has been.
        """
        demand = demand_of([], job, uniform=self._uniform)
        if not self._controller.could_fit(demand):
            raise InfeasibleBudgetError(self._never_fits(demand))

    def warm_up(self, tokens: int) -> None:
        """Run a prompt that nobody asked for, so that the controller learns what steps take.

        Args:
            tokens: Its length.
        """
        demand = Demand(1, tokens + 1)
        self._controller.expect(tokens, tokens)
        if self.jobs or self.newcomer is not None or not self._controller.admit(demand):
            return
        batch = self._new_batch()
        batch.prefill([[0] * tokens])
        self._controller.observe(demand, "prefill")
        batch.extend([0])
        self._controller.observe(demand, "decode")
        batch.close()

    def forget_all(self) -> None:
        """Free all rows, whoever they are of."""
        self._leave_newcomer()
        self._batch.close()
        self._batch = self._new_batch()
        self.jobs = []

    # Passes through the model

    def _prefill(self, newcomer: Newcomer) -> None:
        began, started = self._clock(), time.perf_counter()
        try:
            with self._llm.exclusive():
                mask = self._llm.mask
                logits, count = newcomer.advance()
            seconds = time.perf_counter() - started
            length = newcomer.batch.length
            self._outcomes.tally.prompt_tokens += count
            if logits is not None:
                if self._outcomes.deliver([newcomer.job], logits, mask)[0]:
                    self._batch.join(newcomer.batch)
                    self.jobs.append(newcomer.job)
                self._leave_newcomer()
        except Exception as error:
            self._outcomes.fail([newcomer.job], error)
            self._leave_newcomer()
            if self._batch.size != len(self.jobs):  # it broke while it joined
                self._outcomes.fail(self.jobs, error)
                self.forget_all()
            return
        self._record(began, seconds, "prefill", 1, length, mask)

    def _decode(self) -> None:
        began, started = self._clock(), time.perf_counter()
        jobs = self.jobs
        try:
            with self._llm.exclusive():
                mask = self._llm.mask
                logits = self._batch.extend([job.pending for job in jobs])
            seconds = time.perf_counter() - started
            length = self._batch.length
            alive = self._outcomes.deliver(jobs, logits, mask)
            if not all(alive):
                self._keep([row for row, stays in enumerate(alive) if stays])
        except Exception as error:
            self._outcomes.fail(jobs, error)
            self.forget_all()
            return
        self._record(began, seconds, "decode", len(jobs), length, mask)

    def _record(
        self, began: float, seconds: float, kind: StepKind, rows: int, length: int, mask: BlockMask
    ) -> None:
        newcomer = 0 if self.newcomer is None else self.newcomer.batch.size
        most = max(length, self._batch.length)
        shape = Demand(max(rows, self._batch.size + newcomer), most)
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

    def _never_fits(self, demand: Demand) -> str:
        most = self._controller.gauge.limit_bytes()
        return (
            f"{demand.seq_len_tokens} tokens fit no budget that can be counted on, the largest of "
            f"{most:,} bytes, whatever is removed; ask for less."
        )

    def _running_demand(self) -> Demand:
        if self._demand is None:
            newcomer = self.newcomer
            self._demand = demand_of(
                self.jobs,
                newcomer.job if newcomer else None,
                newcomer.steps_left if newcomer else 0,
                uniform=self._uniform,
            )
        return self._demand

    def _make_fit(self, prefill: bool = False) -> None:
        while True:
            self._expect(self.newcomer if prefill else None)
            if self._controller.check(self._running_demand()) or not self._preempt():
                return

    def _expect(self, newcomer: Newcomer | None) -> None:
        """Tell the controller what the next pass will take: a newcomer's, or a decoding one."""
        rows, length = self._batch.size, self._batch.length
        if newcomer is None:
            self._controller.expect(rows, rows)
            return
        tokens, growth = newcomer.next_tokens, newcomer.next_tokens
        if newcomer.steps_left == 1 and rows:  # it joins then, and the shorter are padded
            final = newcomer.batch.length + tokens
            growth = (rows + 1) * max(length, final) - rows * length - newcomer.batch.length
        self._controller.expect(tokens, growth)

    def _preempt(self) -> bool:
        """Send the newest back to the front of the line; False if nobody runs."""
        if self.newcomer is not None:
            job = self.newcomer.job
            self._leave_newcomer()
        elif self.jobs:
            job = self.jobs[-1]
            self._keep(list(range(len(self.jobs) - 1)))
        else:
            return False
        job.ticket.preemptions += 1
        job.waits_since_s = self._preempted_s = self._clock()
        self._outcomes.tally.preemptions += 1
        self._line.put_first(job)
        return True

    def _take_newcomer(self) -> None:
        job = self._line.first()
        if job is None or self.newcomer is not None or len(self.jobs) >= self._max_batch_size:
            return
        if self.jobs and self._clock() - self._preempted_s < self._controller.hold_s:
            return  # somebody had to make room just now
        steps = -(-job.known_tokens // self._chunk_tokens)
        wanted = demand_of(self.jobs, job, steps, uniform=self._uniform)
        first = min(job.known_tokens, self._chunk_tokens)
        self._controller.expect(first, first)
        if self._controller.admit(wanted, self._running_demand()):
            self._line.leave(job)
            self.newcomer = Newcomer(job, self._llm, self._restore, self._chunk_tokens)
            self._demand = wanted
        elif not self.jobs and self._controller.hopeless(wanted):
            self._line.leave(job)
            self._outcomes.refuse(job, self._never_fits(wanted))

    def _drop_unwanted(self) -> None:
        for job in self._line.remove_if(lambda job: job.ticket.cancelled):
            self._outcomes.end(job, "cancelled")
        if self._queue_timeout_s is not None:
            oldest = self._clock() - self._queue_timeout_s
            for job in self._line.remove_if(lambda job: job.waits_since_s < oldest):
                self._outcomes.refuse(job, f"It waited longer than {self._queue_timeout_s} s.")
        if self.newcomer is not None and self.newcomer.job.ticket.cancelled:
            self._outcomes.end(self.newcomer.job, "cancelled")
            self._leave_newcomer()
        gone = [job for job in self.jobs if job.ticket.cancelled]
        if gone:
            self._keep([row for row, job in enumerate(self.jobs) if not job.ticket.cancelled])
            for job in gone:
                self._outcomes.end(job, "cancelled")

    def _new_batch(self) -> LiveBatch:
        return LiveBatch(self._llm, restore=self._restore, most_tokens=self._chunk_tokens)

    def _keep(self, rows: list[int]) -> None:
        jobs = [self.jobs[row] for row in rows]
        self._batch.keep(rows)
        self.jobs, self._demand = jobs, None

    def _leave_newcomer(self) -> None:
        if self.newcomer is not None:
            self.newcomer.batch.close()
        self.newcomer = self._demand = None

"""Keeps a live model within a memory budget that moves, by changing its plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.plan import Plan
from rap_env.policies.base import PolicyLike, as_policy
from rap_env.runtime.memory_estimator import (
    EMPTY_BATCH,
    UNKNOWN_PASS,
    BatchShape,
    MemoryEstimator,
    PassSize,
)
from rap_env.runtime.memory_meter import Meter, process_meter
from rap_env.runtime.memory_monitor import MemoryMonitor, MemorySource, SafetyMargin
from rap_env.runtime.memory_source import open_memory
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.plan_switcher import Growth, PlanSwitcher
from rap_env.runtime.records import Trigger

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

_RESERVE_PARTS = 4  # of the source's reserve, as few of which are used as suffice


class RuntimeController:
    """Holds measured bytes within a budget that moves, by changing a live model's plan.

    The policy is asked when a request arrives, when the budget falls below the need, and when
    there is headroom again. Its plan is applied if its predicted bytes fit the budget
    together with a learned safety margin (`rap_env.runtime.memory_monitor`). Otherwise the
    policy is asked for a smaller one, and then the guard removes more blocks in its own order
    until they do.

    **Shrinking** is immediate: `check` before each step. **Growing** is debounced while
    anything runs: a plan that needs more is applied once it would have fitted for two seconds,
    with a twentieth of the budget to spare, so that a budget that jitters causes one switch.
    A request that arrives while nothing runs gets its plan at once (`admit`). Once nothing has
    run for a minute, everything that fits is restored. What running requests have in their
    caches is not changed by that; the engine brings it up to the plan.

    **Progress**: a request that waits while nothing runs gets a part of the source's reserve,
    once it is `stalled`, and so does the last one that runs before it would be preempted. The
    part is as small as its least plan allows, and is given back as soon as the batch fits
    without it.

    Only the thread that runs the model may call it; any thread may read the counters.

    Args:
        llm: The live model. With residency ``"resident"`` nothing would be freed, so that
            becomes ``"offload"``.
        policy: Chooses plans: a `Policy`, or any object with a name and ``choose(request)``.
        memory: Gives the budget: a source, or what `open_memory` accepts.
        meter: Measures what is used; by default the process or the device.
        guard_order: Indices of blocks in the order in which the guard removes them. By
            default the policy's `order` if it has one, else those that free most bytes first.
            An empty order disables the guard: only the policy's own plan is tried.
        max_delta_nll: Quality floor: largest rise in NLL, in nats per token, that the policy
            may predict for a plan with which a batch runs. Other plans, and those without a
            prediction, count as plans that do not fit. None for no floor.
        most_delta_nll: What the floor rises to with waiting requests
            (`PlanChooser.follow_queue`); None for a floor that stays.
        chunk_tokens: Most tokens that one pass through the model runs; fewer need less
            workspace.
        clock: Gives the time in seconds.

    Attributes:
        estimator: Predicts bytes.
        monitor: Measures bytes.
        chooser: Chooses plans that fit.
        switcher: Applies plans.
        growth: Raises items of the plan.
        free_kept: Frees so many bytes of what is kept beside the batch, which count as free;
            at once, or as far as there is time to lower it. Whether it has to go on then.
        overhead_s: Seconds spent in the controller, switching and measuring included.

    Raises:
        InvalidRequestError: The policy predicts nothing for `max_delta_nll`, or that is out of
            its range.
        UnknownNameError: There is no such memory source, or no such block in the guard's
            order.
        MemorySourceError: The system does not report free memory.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        policy: PolicyLike,
        memory: MemorySource | Callable[[], float] | int | str,
        *,
        meter: Meter | None = None,
        guard_order: Sequence[int] | None = None,
        max_delta_nll: float | None = None,
        most_delta_nll: float | None = None,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if llm.residency == "resident":
            llm.set_residency("offload")
        self.llm = llm
        self.estimator = MemoryEstimator(llm, chunk_tokens)
        self.monitor = MemoryMonitor(
            llm,
            open_memory(memory, device=llm.device),
            process_meter(llm) if meter is None else meter,
            self.estimator,
            SafetyMargin(clock),
        )
        self.chooser = PlanChooser(
            llm,
            as_policy(policy),
            self.estimator,
            guard_order=guard_order,
            max_delta_nll=max_delta_nll,
            most_delta_nll=most_delta_nll,
        )
        self.switcher = PlanSwitcher(self.chooser, self.monitor, clock)
        self.switcher.before_switch = self._leave_room
        self.free_kept: Callable[[int, bool], bool] = lambda *_: False
        self.overhead_s = 0.0
        self._waiting = 0
        self.growth = Growth(self.chooser, self.switcher, self.monitor, clock)
        # Bytes that were available when no plan fitted a batch and a quality floor.
        self._rejected: dict[tuple[BatchShape, float | None], int] = {}

    # Before and after the steps of the model

    def admit(
        self,
        shape: BatchShape,
        running: BatchShape = EMPTY_BATCH,
        next_pass: PassSize = UNKNOWN_PASS,
        *,
        stalled: bool = False,
    ) -> bool:
        """Choose and apply a plan for a request that has arrived; return whether it may begin.

        While others run, a plan that already fits stays. With nothing else running, a switch
        costs no refill: then the policy is asked for a plan that suits the request, and one
        that needs more than the present plan is applied immediately if it fits with some of the
        budget to spare.

        Args:
            shape: The batch with the request.
            running: The batch without it.
            next_pass: Tokens of the pass that follows.
            stalled: Whether nothing has run for so long that the reserve may be used, and the
                quality floor is at its most.
        """
        with self._timed():
            self.monitor.poll()
            self.chooser.follow_queue(self._waiting - 1, self.llm.plan, running, stalled=stalled)
            fits = self._admit(shape, running, next_pass) or (
                stalled and self._fit_in_reserve(shape, "arrival", next_pass, running=False)
            )
            # While others run, the request waits for each 50 ms of lowering.
            while fits and self._leave_room(self.llm.plan, shape, next_pass, at_once=False):
                fits = not running
            return fits

    def _admit(self, shape: BatchShape, running: BatchShape, next_pass: PassSize) -> bool:
        available = self.monitor.available_bytes(shape, next_pass) - self.monitor.borrowed_bytes
        asked = shape, self.chooser.max_delta_nll
        if asked in self._rejected and available <= self._rejected[asked]:
            return False
        if not self.chooser.fits(self.llm.plan, shape, available):
            if self._fit(shape, available, "arrival", next_pass, running=bool(running)):
                return True
            self._rejected = {asked: available}
            return False
        if self.llm.plan and not running and not self.switcher.unreadable:
            self.growth.at_arrival(shape, next_pass)
        return True

    def check(self, shape: BatchShape, next_pass: PassSize = UNKNOWN_PASS) -> bool:
        """Before each step: lower items if the budget fell, or raise them if there is headroom.

        Args:
            shape: The running batch.
            next_pass: Tokens of the pass that follows.

        Returns:
            Whether the batch fits now. If not, no plan makes it fit: preempt and call again.
        """
        with self._timed():
            self.monitor.poll()
            if not shape:
                self.monitor.borrow(0)
                self.monitor.observe_idle()
            self._leave_room(self.llm.plan, shape, next_pass)
            self.chooser.follow_queue(self._waiting, self.llm.plan, shape)
            if self.switcher.retry():
                self._rejected = {}
                self.growth.forget_failure()
            was_idle = self.growth.was_idle(shape)
            available = self._repaid_bytes(shape, self.monitor.available_bytes(shape, next_pass))
            if not self.chooser.fits(self.llm.plan, shape, available):
                return self._lower(shape, available, next_pass)
            if self.llm.plan and not self.switcher.unreadable:
                if was_idle:
                    self.growth.at_rest(next_pass)
                else:
                    self.growth.before_step(shape, next_pass)
            return True

    def room_for_kept(
        self,
        shape: BatchShape,
        next_pass: PassSize = UNKNOWN_PASS,
        plan: Plan | None = None,
    ) -> int:
        """Bytes that may be kept beside a batch, by default with the present plan.

        That is what the batch at its largest leaves, and what the next pass leaves of what is
        used now; lowering what is kept, between two passes, fits in either, so that it never
        takes more than the limit that held when it began. May be negative.
        """
        monitor, plan = self.monitor, self.llm.plan if plan is None else plan
        estimator, lowering_bytes = self.estimator, self.estimator.lowering_bytes
        margin = monitor.margin.bytes_for(prefills=next_pass.prefills)
        margin += max(0, lowering_bytes - estimator.workspace_bytes(shape))
        beside_batch = monitor.budget_bytes - margin - estimator.peak_bytes(plan, shape)
        estimate = estimator.pass_estimate(plan, shape, next_pass)
        pass_bytes = estimate.growth + max(estimate.workspace, lowering_bytes)
        used_bytes = monitor.meter.used_bytes() - self.llm.kept_bytes
        return min(beside_batch, monitor.budget_bytes - used_bytes - pass_bytes)

    def _leave_room(
        self, plan: Plan, shape: BatchShape, next_pass: PassSize, *, at_once: bool = True
    ) -> bool:
        """Free what is kept, as far as a batch with a plan needs it; whether more is to go."""
        if self.llm.kept_bytes <= max(0, self.room_for_kept(shape, next_pass, plan)):
            return False
        self.monitor.trim()
        excess = self.llm.kept_bytes - max(0, self.room_for_kept(shape, next_pass, plan))
        if excess <= 0:
            return False
        unfinished = self.free_kept(excess, at_once)
        self.monitor.trim()
        return unfinished

    def must_interrupt(self) -> bool:
        """Whether a pass is to end: the budget fell below what is used without what is kept."""
        excess = self.monitor.excess_bytes()
        if excess and self.llm.kept_bytes:
            self.free_kept(excess, True)
            excess = self.monitor.excess_bytes()
        return excess > 0

    def has_room(self, shape: BatchShape, next_pass: PassSize) -> bool:
        """Whether the present plan fits a batch as it is."""
        self.monitor.poll()
        available = self.monitor.available_bytes(shape, next_pass)
        return self.chooser.fits(self.llm.plan, shape, available)

    def observe(self, shape: BatchShape, kind: str = "step") -> int:
        """After each step: learn from what the meter measured.

        Args:
            shape: The batch that was in memory, padding included.
            kind: What the step did; the margin of each kind is learned separately.

        Returns:
            Peak bytes measured since the last step or switch.
        """
        with self._timed():
            return self.monitor.observe_step(shape, kind)

    def note_preemption(self) -> None:
        """After a request was preempted: what it took is not expected of later steps."""
        with self._timed():
            self.monitor.trim()

    def note_out_of_memory(self, kind: str) -> None:
        """After a pass ran out of memory: expect no more than it had; kinds are as in `observe`."""
        with self._timed():
            self.monitor.observe_out_of_memory(kind)

    def note_waiting(self, count: int) -> None:
        """At the start of each turn: how many requests wait; the quality floor depends on it."""
        self._waiting = count

    def forget_margin(self) -> None:
        """Expect no more than what is measured now, where requests wait and nothing runs."""
        with self._timed():
            self.monitor.margin.forget()
            self.monitor.trim()
            self._rejected = {}

    # When to lower and raise

    def _fit(
        self,
        shape: BatchShape,
        available_bytes: int,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a plan that needs no more than is available; return whether one fits."""
        self.growth.reset()
        choice = self.switcher.choose(shape, available_bytes, running=running)
        return self.switcher.settle(choice, shape, trigger, next_pass, running=running)

    def _lower(self, shape: BatchShape, available_bytes: int, next_pass: PassSize) -> bool:
        """As `_fit`, after the budget fell; the last request that runs may use the reserve."""
        if self._fit(shape, available_bytes, "budget_fell", next_pass, running=bool(shape)):
            return True
        if not shape:
            self.switcher.remove_all()  # nothing is left to preempt
            return False
        return shape.rows == 1 and self._fit_in_reserve(
            shape, "budget_fell", next_pass, running=True
        )

    def _fit_in_reserve(
        self, shape: BatchShape, trigger: Trigger, next_pass: PassSize, *, running: bool
    ) -> bool:
        """As `_fit`, with the least part of the source's reserve with which a plan fits."""
        monitor = self.monitor
        if not (reserve := monitor.usable_reserve_bytes):
            return False
        most = monitor.trimmed_bytes(shape, next_pass) - monitor.borrowed_bytes + reserve
        if not self.chooser.could_fit(shape, most):
            return False
        for part in range(1, _RESERVE_PARTS + 1):
            monitor.borrow(reserve * part // _RESERVE_PARTS)
            available = monitor.trimmed_bytes(shape, next_pass)
            fits = self.chooser.fits(self.llm.plan, shape, available)
            if fits or self._fit(shape, available, trigger, next_pass, running=running):
                return True
        monitor.borrow(0)
        return False

    def _repaid_bytes(self, shape: BatchShape, available_bytes: int) -> int:
        """Bytes that are available, after the reserve was given back if the plan fits without."""
        repaid = available_bytes - self.monitor.borrowed_bytes
        if repaid == available_bytes or not self.chooser.fits(self.llm.plan, shape, repaid):
            return available_bytes
        self.monitor.borrow(0)
        return repaid

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.overhead_s += time.perf_counter() - started

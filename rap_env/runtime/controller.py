"""Keeps a live model within a memory budget that moves, by changing its plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.policies.base import PolicyLike, as_policy
from rap_env.runtime.batch_shape import EMPTY_BATCH, UNKNOWN_PASS, BatchShape, PassSize
from rap_env.runtime.decisions import DecisionLog, Trigger
from rap_env.runtime.feasibility import Feasibility
from rap_env.runtime.memory_estimator import MemoryEstimator
from rap_env.runtime.memory_meter import Meter, process_meter
from rap_env.runtime.memory_monitor import Debounce, MemoryMonitor, SafetyMargin
from rap_env.runtime.memory_source import MemorySource, open_memory
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser
from rap_env.runtime.plan_switcher import PlanSwitcher

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

_RESERVE_PARTS = 4  # of the source's reserve, as few of which are used as suffice

_Rejected = tuple[BatchShape, int, float | None]
"""A batch, available bytes and a quality floor with which no plan fitted it."""
IDLE_RESTORE_S = 60.0
"""Seconds without a request after which everything that fits is restored, without a reserve."""


def _is_no_more(asked: _Rejected, rejected: _Rejected) -> bool:
    """Whether what was rejected is asked for again, with no more bytes and no other floor."""
    return asked[0] == rejected[0] and asked[1] <= rejected[1] and asked[2] == rejected[2]


class RuntimeController(Feasibility):
    """Holds measured bytes within a budget that moves, by changing a live model's plan.

    The policy is asked when a request arrives, when the budget falls below the need, and when
    there is headroom again. Its plan is applied only if its predicted bytes fit the budget
    together with a safety margin that is learned from measurements
    (`rap_env.runtime.memory_monitor`). Otherwise the policy is asked for a smaller one, and then
    the guard removes more blocks in its own order until they do.

    **Shrinking** is immediate: `check` before each step. **Growing** is debounced while anything
    runs: a plan that needs more is applied only after it would have fitted for `hold_s` without a
    break, with `hysteresis_share` of the budget to spare. A budget that jitters around a threshold
    causes one switch, not many. A request that arrives while nothing runs gets its plan at once
    (`admit`). Once nothing has run for `IDLE_RESTORE_S`, everything that fits is restored, and none
    of the budget stays spare. Weights return to any level exactly and at any time. Caches of
    running requests keep a lowered level, and new ones get that of the plan, where `PlanSwitcher`
    is told the levels of rows, as the engine does; it then reads rows back from files, or refills
    them. Otherwise a refill, a pass over all tokens, is made for attention blocks that return and
    for caches that leave 2 bits alone.

    **Progress**: a request that waits while nothing runs gets a part of the source's reserve, once
    it is `stalled`, and so does the last one that runs before it would be preempted. The part is as
    small as its least plan allows, and is given back as soon as the batch fits without it.

    Only the thread that runs the model may call it; any thread may read the counters.

    Args:
        llm: The live model. Set its residency first: with ``"resident"``, removing an FFN block
            frees nothing, and the guard takes that into account.
        policy: Chooses plans: a `Policy`, or any object with a name and ``choose(request)``.
        memory: Gives the budget: a source, or what `open_memory` accepts.
        meter: Measures what is used; by default the process or the device.
        guard_order: Indices of blocks in the order in which the guard removes them. By
            default the policy's `order` if it has one, else those that free most bytes first.
            An empty order disables the guard: only the policy's own plan is tried.
        max_delta_nll: Quality floor: largest rise in NLL, in nats per token, that the policy may
            predict for a plan with which a batch runs. Other plans, and those without a prediction,
            count as plans that do not fit. None for no floor.
        most_delta_nll: What the floor rises to with waiting requests (`PlanChooser.follow_queue`);
            None for a floor that stays.
        hysteresis_share: Share of the budget to leave free when items are raised.
        hold_s: Seconds for which headroom must last before items are raised.
        chunk_tokens: Most tokens that one pass through the model runs; fewer need less workspace.
        log: Where to log decisions.
        clock: Gives the time in seconds, for `hold_s`, the safety margin and the log.

    Attributes:
        estimator: Predicts bytes.
        monitor: Measures bytes.
        chooser: Chooses plans that fit.
        switcher: Applies plans.
        overhead_s: Seconds spent in the controller, switching and measuring included.
        stall_reason: Why requests wait and nothing runs; empty while something does.

    Raises:
        InvalidRequestError: A share, a time or a rise is out of its range, or the policy predicts
            nothing for `max_delta_nll`.
        UnknownNameError: There is no such memory source, or no such block in the guard's order.
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
        hysteresis_share: float = 0.05,
        hold_s: float = 2.0,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        log: DecisionLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= hysteresis_share < 1 or hold_s < 0:
            raise InvalidRequestError(
                "hysteresis_share must be from 0 to below 1 and hold_s at least 0, "
                f"not {hysteresis_share} and {hold_s}."
            )
        super().__init__()
        self.llm = llm
        self.estimator = MemoryEstimator(llm, chunk_tokens)
        self.monitor = MemoryMonitor(
            llm,
            open_memory(memory, device=llm.device),
            process_meter(llm) if meter is None else meter,
            self.estimator,
            SafetyMargin(clock=clock),
        )
        self.chooser = PlanChooser(
            as_policy(policy),
            self.estimator,
            guard_order=guard_order,
            max_delta_nll=max_delta_nll,
            most_delta_nll=most_delta_nll,
        )
        self.switcher = PlanSwitcher(llm, self.chooser, self.estimator, self.monitor, log, clock)
        self.hold_s = hold_s
        self.overhead_s = 0.0
        self._hysteresis_share = hysteresis_share
        self._clock = clock
        self._debounce = Debounce(hold_s)
        self._idle_since_s: float | None = None  # or of the last attempt to restore everything
        self._rejected: _Rejected | None = None
        self._retry_above: tuple[BatchShape, int] | None = None  # less headroom raises nothing

    # Before and after the steps of the model

    def admit(
        self,
        shape: BatchShape,
        running: BatchShape = EMPTY_BATCH,
        next_pass: PassSize = UNKNOWN_PASS,
        *,
        stalled: bool = False,
    ) -> bool:
        """Choose and apply a plan for a request that has arrived; return whether one fits.

        While others run, a plan that already fits stays. With nothing else running, a switch costs
        no refill: then the policy is asked for a plan that suits the request, and one that needs
        more than the present plan is applied immediately if it fits with `hysteresis_share` spare.

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
            if self._admit(shape, running, next_pass) or (
                stalled and self._fit_in_reserve(shape, "arrival", next_pass, running=False)
            ):
                self.stall_reason = ""
                return True
            return False

    def _admit(self, shape: BatchShape, running: BatchShape, next_pass: PassSize) -> bool:
        available = self._available_bytes(shape, next_pass) - self.monitor.borrowed_bytes
        rejected = (shape, available, self.chooser.max_delta_nll)
        if self._rejected and _is_no_more(rejected, self._rejected):
            return False
        if not self.switcher.present_fits(shape, available):
            if self._fit(shape, available, "arrival", next_pass, running=bool(running)):
                return True
            self._rejected = rejected
            return False
        if self.llm.plan and not running:
            choice = self.chooser.choose(shape, self._growth_limit_bytes(next_pass))
            self._raise_to(choice, shape, "arrival", next_pass)
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
            self.chooser.follow_queue(self._waiting, self.llm.plan, shape)
            if self.switcher.unreadable.retry():
                self._rejected = self._retry_above = None
            idle = self._was_idle(shape)
            available = self._available_bytes(shape, next_pass)
            repaid = available - self.monitor.borrowed_bytes
            if repaid < available and self.switcher.present_fits(shape, repaid):
                self.monitor.borrow(0)
                available = repaid
            if not self.switcher.present_fits(shape, available):
                fits = self._fit(shape, available, "budget_fell", next_pass, running=bool(shape))
                if not fits and shape.rows == 1:
                    fits = self._fit_in_reserve(shape, "budget_fell", next_pass, running=True)
                if not fits and not shape:
                    self.switcher.remove_all()  # nothing is left to preempt
                return fits
            if self.llm.plan and idle:  # without a reserve or a debounce
                available = self._available_after_trim_bytes(EMPTY_BATCH, next_pass)
                choice = self.chooser.choose(EMPTY_BATCH, available)
                self._raise_to(choice, EMPTY_BATCH, "room", next_pass)
            elif self.llm.plan:
                self._grow(shape, next_pass)
            return True

    def observe(self, shape: BatchShape, kind: str = "step") -> int:
        """After each step: learn from what the meter measured.

        Args:
            shape: The batch that was in memory, padding included.
            kind: What the step did; the margin of each kind is learned separately.

        Returns:
            Peak bytes measured since the last step or switch.
        """
        with self._timed():
            if kind != "prefill":
                self.switcher.note_decode()
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
        if not count:
            self.stall_reason = ""

    def forget_margin(self) -> None:
        """Expect no more than what is measured now, where requests wait and nothing runs."""
        with self._timed():
            self.monitor.margin.forget()
            self.monitor.trim()
            self._rejected = None

    def before_step(self, shape: BatchShape) -> Callable[[], None]:
        """Return a callback for ``llm.generate(before_step=...)`` that checks before each step.

        Admit the batch, at its final length, first. The callback raises `InfeasibleBudgetError`
        when no plan fits any more.
        """
        next_pass = PassSize(shape.batch_size, shape.batch_size)

        def before() -> None:
            self.observe(shape)
            if not self.check(shape, next_pass):
                raise InfeasibleBudgetError(
                    f"No plan{self.chooser.floor_clause} fits {self.monitor.budget_bytes:,} bytes "
                    f"for {shape.batch_size} x {shape.seq_len_tokens} tokens any more, with a "
                    f"safety margin of {self.monitor.margin.bytes:,} bytes: raise the budget or "
                    "generate less."
                )

        return before

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
        self._debounce.reset()
        self._retry_above = None
        choice = self.switcher.choose(shape, available_bytes, running=running)
        if choice is None:
            return False
        return self.switcher.settle(choice, shape, trigger, next_pass, running=running)

    def _fit_in_reserve(
        self, shape: BatchShape, trigger: Trigger, next_pass: PassSize, *, running: bool
    ) -> bool:
        """As `_fit`, with the least part of the source's reserve with which a plan fits."""
        monitor = self.monitor
        if not (reserve := monitor.usable_reserve_bytes):
            return False
        most = self._available_after_trim_bytes(shape, next_pass) - monitor.borrowed_bytes + reserve
        if not self.could_fit_in(shape, most):
            return False
        for part in range(1, _RESERVE_PARTS + 1):
            monitor.borrow(reserve * part // _RESERVE_PARTS)
            available = self._available_after_trim_bytes(shape, next_pass)
            fits = self.switcher.present_fits(shape, available)
            if fits or self._fit(shape, available, trigger, next_pass, running=running):
                return True
        monitor.borrow(0)
        return False

    def _raise_to(
        self,
        choice: PlanChoice | None,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
    ) -> bool:
        """Apply a choice if it is better than the present plan; return whether it is."""
        if choice is None or not self.switcher.improves(choice, shape):
            return False
        running = trigger != "arrival" and bool(shape)
        self.switcher.settle(choice, shape, trigger, next_pass, running=running)
        self._debounce.reset()
        self._retry_above = None
        return True

    def _grow(self, shape: BatchShape, next_pass: PassSize) -> None:
        """Raise items once there has been headroom above the present need long enough."""
        need = self.estimator.peak_bytes(self.llm.plan, shape)
        headroom = self._growth_limit_bytes(next_pass) - need
        least = self.estimator.least_raise_bytes(self.llm.plan, shape)
        lasting = self._debounce.update(self._clock(), headroom, least)
        if lasting is None or (
            self._retry_above and self._retry_above[0] == shape and lasting < self._retry_above[1]
        ):
            return
        available = self._available_after_trim_bytes(shape, next_pass) - self._reserve_bytes()
        choice = self.switcher.choose_higher(shape, min(need + lasting, available), available)
        trigger: Trigger = "left" if shape.tokens < self.switcher.last_shape.tokens else "room"
        if not self._raise_to(choice, shape, trigger, next_pass):
            self._retry_above = (shape, lasting + least)  # with headroom for one more block

    # Bytes and times

    def _available_bytes(self, shape: BatchShape, next_pass: PassSize) -> int:
        estimate = self.switcher.pass_estimate(shape, next_pass)
        return self.monitor.available_bytes(shape, estimate)

    def _available_after_trim_bytes(self, shape: BatchShape, next_pass: PassSize) -> int:
        self.monitor.trim()
        estimate = self.switcher.pass_estimate(shape, next_pass)
        return self.monitor.available_after_trim_bytes(shape, estimate)

    def _reserve_bytes(self) -> int:
        spare = int(self.monitor.budget_bytes * self._hysteresis_share)
        return spare + self.monitor.borrowed_bytes

    def _growth_limit_bytes(self, next_pass: PassSize) -> int:
        margin = self.monitor.margin.bytes_for(prefills=next_pass.prefills)
        return self.monitor.budget_bytes - self._reserve_bytes() - margin

    def _was_idle(self, shape: BatchShape) -> bool:
        """Whether nothing has run for `IDLE_RESTORE_S`; true once in that time."""
        now, since_s = self._clock(), self._idle_since_s
        if not shape and since_s is not None and now - since_s < IDLE_RESTORE_S:
            return False
        self._idle_since_s = None if shape else now
        return not shape and since_s is not None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.overhead_s += time.perf_counter() - started

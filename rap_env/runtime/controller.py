"""What keeps a live model within a memory budget that moves: its parts and settings."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.errors import ChecksumError, ModelNotAvailableError, RapError
from rap_env.models.device import synchronise
from rap_env.plan import Plan
from rap_env.policies.base import PolicyLike, as_policy
from rap_env.runtime.decision import (
    Action,
    Apply,
    Borrow,
    FreeKept,
    Preempt,
    RowAction,
    Snapshot,
    Wait,
    decide,
)
from rap_env.runtime.kept_sequences import KeptSequences
from rap_env.runtime.memory_estimator import BatchShape, MemoryEstimator
from rap_env.runtime.memory_limit import open_memory
from rap_env.runtime.memory_monitor import (
    MemoryMonitor,
    MemorySource,
    Meter,
    SafetyMargin,
    process_meter,
)
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.records import ControllerSettings, Trigger

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Seconds between two looks at weights that could not be read."""
IDLE_RESTORE_S = 60.0
"""Seconds without a request after which everything that fits is restored, without a
reserve."""
_UNREADABLE = (ChecksumError, ModelNotAvailableError)
_LOOK_S = 0.02  # between looks at the budget within a prefill chunk
_MOST_INTERRUPTIONS = 3  # of one chunk; with a budget that jumps, it would never end


class RuntimeController:
    """Holds measured bytes within a budget that moves, by changing a live model's plan.

    It has the parts with which an `Engine` does that. The policy is asked when a request
    arrives, when the budget falls below the need, and when there is headroom again. Its plan
    is applied if its predicted bytes fit the budget together with a learned safety margin
    (`rap_env.runtime.memory_monitor`). Otherwise the policy is asked for a smaller one, and
    then the guard removes more blocks in its own order until they do.

    **Shrinking** is immediate: before each step. **Growing** is debounced while anything
    runs: a plan that needs more is applied once it would have fitted for two seconds, with a
    twentieth of the budget to spare, so that a budget that jitters causes one switch. A
    request that arrives while nothing runs gets its plan at once. Once nothing has run for a
    minute, everything that fits is restored. What running requests have in their caches is
    not changed by that; the engine brings it up to the plan.

    **Progress**: a request that waits while nothing runs gets a part of the source's reserve,
    once it is stalled, and so does the last one that runs before it would be preempted. The
    part is as small as its least plan allows, and is given back as soon as the batch fits
    without it.

    Only the engine's thread changes it; any thread may read the counters.

    Args:
        llm: The live model. With residency ``"resident"`` nothing would be freed, so that
            becomes ``"offload"``.
        policy: Chooses plans: a `Policy`, or any object with a name and ``choose(request)``.
        memory: Gives the budget: a source, or what `open_memory` accepts.
        settings: How plans are chosen.
        meter: Measures what is used; by default the process or the device.
        clock: Gives the time in seconds.

    Attributes:
        estimator: Predicts bytes.
        monitor: Measures bytes.
        chooser: Chooses plans that fit.
        switcher: Applies plans.
        headroom: Says when to raise them.
        overhead_s: Seconds spent on decisions, switching and measuring included.

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
        settings: ControllerSettings = ControllerSettings(),
        *,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if llm.residency == "resident":
            llm.set_residency("offload")
        self.llm = llm
        self.settings = settings
        self.clock = clock
        self.estimator = MemoryEstimator(llm, settings.chunk_tokens)
        self.monitor = MemoryMonitor(
            llm,
            open_memory(memory, device=llm.device),
            process_meter(llm) if meter is None else meter,
            self.estimator,
            SafetyMargin(clock),
        )
        self.chooser = PlanChooser(llm, as_policy(policy), self.estimator, settings)
        self.switcher = PlanSwitcher(self.chooser, self.monitor, clock)
        self.headroom = Headroom(settings.hold_s, clock)
        self.overhead_s = 0.0
        # Bytes that were available when no plan fitted a batch and a quality floor.
        self._rejected: dict[tuple[BatchShape, float], int] = {}
        self._next_look_s = 0.0
        self._interruptions = 0  # of the chunk that is next

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a ``with`` block as overhead."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.overhead_s += time.perf_counter() - started

    def act(self, asked: Snapshot, kept: KeptSequences) -> RowAction | None:
        """Act until the next pass may run, or until it is the turn of rows.

        Args:
            asked: What is known of the batch; what is measured is filled in.
            kept: What is kept beside the batch.

        Returns:
            What is to be done with rows; None if the pass may run.
        """
        with self.timed():
            snapshot = self._begin(asked)
            while actions := decide(snapshot, self.chooser):
                for action in actions:
                    if not isinstance(action, Action):
                        return self._end(action, snapshot)
                    done = self._do(action, snapshot, kept)
                    progress = snapshot.progress.after(action, failed=not done)
                    snapshot = replace(snapshot, progress=progress)
                snapshot = self._measured(snapshot)
            if snapshot.lasting_bytes is not None and not snapshot.progress.exact:
                # Nothing better fitted in so much headroom.
                least_bytes = self.estimator.least_raise_bytes(snapshot.plan, snapshot.running)
                self.headroom.note_failure(snapshot.running, snapshot.lasting_bytes + least_bytes)
            return None

    def _begin(self, asked: Snapshot) -> Snapshot:
        """The first snapshot of several decisions that follow one another."""
        monitor = self.monitor
        monitor.poll()
        looks_at_rows = asked.joined is None
        if looks_at_rows and not asked.running:
            monitor.borrow(0)
            monitor.observe_idle()
        if looks_at_rows and self.switcher.retry():
            self._rejected = {}
            self.headroom.forget_failure()
        floor = self.chooser.follow_queue(
            asked.waiting, self.llm.plan, asked.running, stalled=asked.stalled
        )
        snapshot = self._measured(
            replace(
                asked,
                floor=floor,
                rests=looks_at_rows and self.headroom.was_idle(asked.running),
                rejected_bytes=None if looks_at_rows else self._rejected.get((asked.shape, floor)),
            )
        )
        if looks_at_rows and snapshot.plan and snapshot.readable and not snapshot.rests:
            return replace(snapshot, lasting_bytes=self._lasting_bytes(snapshot))
        return snapshot

    def _measured(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with what is measured now."""
        monitor = self.monitor
        return replace(
            snapshot,
            plan=self.llm.plan,
            budget_bytes=monitor.budget_bytes,
            reserve_bytes=monitor.usable_reserve_bytes,
            borrowed_bytes=monitor.borrowed_bytes,
            used_bytes=monitor.used_bytes,
            held_bytes=monitor.held.total,
            kept_bytes=self.llm.kept_bytes,
            margin_bytes=monitor.margin.bytes_for(prefills=snapshot.next_pass.prefills),
            spare_bytes=int(monitor.budget_bytes * self.settings.spare_share),
            readable=not self.switcher.unreadable,
        )

    def _lasting_bytes(self, snapshot: Snapshot) -> int | None:
        estimator, plan, shape = self.estimator, snapshot.plan, snapshot.running
        need_bytes = snapshot.spare_bytes + snapshot.borrowed_bytes + snapshot.margin_bytes
        need_bytes += estimator.peak_bytes(plan, shape)
        least_bytes = estimator.least_raise_bytes(plan, shape)
        return self.headroom.lasting_bytes(shape, snapshot.budget_bytes - need_bytes, least_bytes)

    def _do(self, action: Action, snapshot: Snapshot, kept: KeptSequences) -> bool:
        """Do an action, so that memory is measured after it; whether that was all of it."""
        done = True
        if isinstance(action, Apply):
            self.headroom.reset()
            return self.switcher.apply(action.plan, snapshot.shape, action.trigger)
        if isinstance(action, FreeKept):
            done = not kept.free(action.bytes, action.at_once)
        elif isinstance(action, Borrow):
            self.monitor.borrow(action.bytes)
        self.monitor.trim()
        return done

    def _end(self, action: RowAction, snapshot: Snapshot) -> RowAction:
        """Note what was too little for a batch."""
        tried = isinstance(action, Preempt)
        if isinstance(action, Wait) and (too_few_bytes := action.too_few_bytes) is not None:
            known_bytes = snapshot.rejected_bytes
            if known_bytes is None or too_few_bytes > known_bytes:
                self._rejected = {(snapshot.shape, snapshot.floor): too_few_bytes}
                tried = True
        if tried:
            self.headroom.reset()
        return action

    # Within a pass

    def new_chunk(self) -> None:
        """The next chunk is another one than the last, which may have been interrupted."""
        self._interruptions = 0

    def must_interrupt(self, kept: KeptSequences) -> bool:
        """Whether a chunk is to end: the budget fell below what is used without what is kept."""
        now = time.perf_counter()
        if now < self._next_look_s or self._interruptions >= _MOST_INTERRUPTIONS:
            return False
        self._next_look_s = now + _LOOK_S
        excess_bytes = self.monitor.excess_bytes()
        if excess_bytes and self.llm.kept_bytes:
            kept.free(excess_bytes)
            excess_bytes = self.monitor.excess_bytes()
        self._interruptions += excess_bytes > 0
        return excess_bytes > 0

    def forget_margin(self) -> None:
        """Expect no more than what is measured now, where requests wait and nothing runs."""
        with self.timed():
            self.monitor.margin.forget()
            self.monitor.trim()
            self._rejected = {}


class PlanSwitcher:
    """Applies plans, measures, and logs each change; `clock` gives the time in seconds.

    Attributes:
        unreadable: Why the weights of a chosen plan cannot be read; empty if they can. Until
            `retry` finds that they can again, the plan is not to be raised.
        switches: How often the plan changed.
    """

    def __init__(
        self, chooser: PlanChooser, monitor: MemoryMonitor, clock: Callable[[], float]
    ) -> None:
        self._chooser = chooser
        self._llm = chooser.llm
        self._monitor = monitor
        self._clock = clock
        self.unreadable = ""
        self._unreadable_plan = Plan()
        self._retry_at_s = 0.0
        self.switches = 0

    def apply(self, plan: Plan, shape: BatchShape, trigger: Trigger) -> bool:
        """Apply a plan for a batch, because of a trigger, and return freed memory to the system.

        Returns:
            Whether its weights can be read; else the present plan stays.
        """
        before = self._llm.plan
        try:
            self._llm.apply(plan)
        except _UNREADABLE as error:
            self._note_unreadable(plan, error)
            return False
        synchronise(self._llm.device)
        self._monitor.trim()
        self.switches += 1
        rise = self._chooser.rise(plan, shape.at_least_one[1])
        log.info(
            "Plan changed (%s): %s; budget %.1f MiB, peak %.1f MiB%s.",
            trigger,
            textwrap.shorten(before.summary_of_change(plan), 280) or "nothing",
            self._monitor.budget_bytes / 2**20,
            self._chooser.estimator.peak_bytes(plan, shape) / 2**20,
            "" if rise is None else f", ΔNLL {rise:.4g}",
        )
        return True

    def retry(self) -> bool:
        """Whether weights that could not be read are there again; looked at every `RETRY_S`."""
        if not self.unreadable or self._clock() < self._retry_at_s:
            return False
        try:
            self._llm.prepare(self._unreadable_plan)
        except _UNREADABLE as error:
            self._note_unreadable(self._unreadable_plan, error)
            return False
        log.info("The weights of the plan can be read again.")
        self.unreadable = ""
        return True

    def _note_unreadable(self, plan: Plan, error: RapError) -> None:
        self._unreadable_plan, self._retry_at_s = plan, self._clock() + RETRY_S
        if not self.unreadable:
            log.warning("The plan stays, and a try follows every %g s: %s", RETRY_S, error)
        self.unreadable = str(error)


class Headroom:
    """How long there has been headroom for a better plan, and for how long nothing has run.

    Headroom in which nothing could be raised for a batch is not tried again for that batch.

    Args:
        hold_s: Seconds for which headroom must last while requests run, so that the plan does
            not flap.
        clock: Gives the time in seconds.

    Attributes:
        hold_s: As given.
    """

    def __init__(self, hold_s: float, clock: Callable[[], float]) -> None:
        self.hold_s = hold_s
        self._clock = clock
        self._since_s: float | None = None  # there has been headroom
        self._least_bytes = 0  # of headroom since then
        # A batch, and enough bytes for it.
        self._failure: tuple[BatchShape, int] | None = None
        # Or of the last attempt to restore everything.
        self._idle_since_s: float | None = None

    def reset(self) -> None:
        """Wait for headroom from now on."""
        self._since_s = self._failure = None

    def note_failure(self, shape: BatchShape, least_bytes: int) -> None:
        """Nothing could be raised for a batch; at least so many bytes are worth another try."""
        self._failure = shape, least_bytes

    def forget_failure(self) -> None:
        """Try again in headroom in which nothing could be raised."""
        self._failure = None

    def was_idle(self, shape: BatchShape) -> bool:
        """Whether nothing has run for `IDLE_RESTORE_S`; true once in that time."""
        now, since_s = self._clock(), self._idle_since_s
        if not shape and since_s is not None and now - since_s < IDLE_RESTORE_S:
            return False
        self._idle_since_s = None if shape else now
        return not shape and since_s is not None

    def lasting_bytes(
        self, shape: BatchShape, headroom_bytes: int, useful_bytes: int
    ) -> int | None:
        """Bytes that were free throughout `hold_s`, after which a new wait begins; else None.

        Less than `useful_bytes` restarts the wait.
        """
        now = self._clock()
        if headroom_bytes < useful_bytes:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s, self._least_bytes = now, headroom_bytes
        self._least_bytes = min(self._least_bytes, headroom_bytes)
        if now - self._since_s < self.hold_s:
            return None
        least = self._least_bytes
        self._since_s, self._least_bytes = now, headroom_bytes
        if self._failure is not None and self._failure[0] == shape and least < self._failure[1]:
            return None
        return least

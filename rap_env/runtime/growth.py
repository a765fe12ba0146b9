"""When the plan's items are raised: once headroom has lasted, and all at once after a long rest."""

from __future__ import annotations

from collections.abc import Callable

from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser
from rap_env.runtime.plan_switcher import PlanSwitcher
from rap_env.runtime.records import Trigger

IDLE_RESTORE_S = 60.0
"""Seconds without a request after which everything that fits is restored, without a reserve."""


class Growth:
    """Raises items of the plan; arguments are those and the parts of `RuntimeController`.

    While requests run, headroom has to last for `hold_s`, so that the plan does not flap. Headroom
    in which nothing could be raised for a batch is not tried again for that batch.
    """

    def __init__(
        self,
        chooser: PlanChooser,
        switcher: PlanSwitcher,
        monitor: MemoryMonitor,
        clock: Callable[[], float],
        *,
        hysteresis_share: float,
        hold_s: float,
    ) -> None:
        self._chooser = chooser
        self._switcher = switcher
        self._monitor = monitor
        self._clock = clock
        self._hysteresis_share = hysteresis_share
        self._hold_s = hold_s
        self._since_s: float | None = None  # there has been headroom
        self._least_bytes = 0  # of headroom since then
        self._failure: tuple[BatchShape, int] | None = None  # a batch, and enough bytes for it
        self._idle_since_s: float | None = None  # or of the last attempt to restore everything

    def reset(self) -> None:
        """Wait for headroom from now on."""
        self._since_s = self._failure = None

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

    def at_arrival(self, shape: BatchShape, next_pass: PassSize) -> None:
        """Raise items at once for a request that arrives while nothing runs."""
        choice = self._chooser.choose(shape, self._limit_bytes(next_pass))
        self._raise_to(choice, shape, "arrival", next_pass)

    def at_rest(self, next_pass: PassSize) -> None:
        """Raise all that fits while nothing runs, without a reserve or a debounce."""
        available = self._monitor.trimmed_bytes(EMPTY_BATCH, next_pass)
        choice = self._chooser.choose(EMPTY_BATCH, available)
        self._raise_to(choice, EMPTY_BATCH, "room", next_pass)

    def before_step(self, shape: BatchShape, next_pass: PassSize) -> None:
        """Raise items once there has been headroom above the present need long enough."""
        plan, estimator = self._chooser.llm.plan, self._chooser.estimator
        need = estimator.peak_bytes(plan, shape)
        headroom = self._limit_bytes(next_pass) - need
        least = estimator.least_raise_bytes(plan, shape)
        lasting = self._lasting_bytes(headroom, least)
        if lasting is None or (
            self._failure and self._failure[0] == shape and lasting < self._failure[1]
        ):
            return
        available = self._monitor.trimmed_bytes(shape, next_pass) - self._reserve_bytes()
        choice = self._chooser.choose(shape, min(need + lasting, available))
        trigger: Trigger = "left" if shape.tokens < self._switcher.last_shape.tokens else "room"
        if not self._raise_to(choice, shape, trigger, next_pass):
            self._failure = shape, lasting + least  # with headroom for one more block

    def _raise_to(
        self, choice: PlanChoice | None, shape: BatchShape, trigger: Trigger, next_pass: PassSize
    ) -> bool:
        """Apply a choice if it is better than the present plan; return whether it is."""
        if choice is None or not self._switcher.improves(choice, shape):
            return False
        running = trigger != "arrival" and bool(shape)
        self._switcher.settle(choice, shape, trigger, next_pass, running=running)
        self.reset()
        return True

    def _lasting_bytes(self, headroom_bytes: int, useful_bytes: int) -> int | None:
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
        if now - self._since_s < self._hold_s:
            return None
        least = self._least_bytes
        self._since_s, self._least_bytes = now, headroom_bytes
        return least

    def _limit_bytes(self, next_pass: PassSize) -> int:
        margin = self._monitor.margin.bytes_for(prefills=next_pass.prefills)
        return self._monitor.budget_bytes - self._reserve_bytes() - margin

    def _reserve_bytes(self) -> int:
        spare = int(self._monitor.budget_bytes * self._hysteresis_share)
        return spare + self._monitor.borrowed_bytes

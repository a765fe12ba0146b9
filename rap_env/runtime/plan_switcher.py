"""Applies plans to a live model until the measured bytes fit."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Callable

from rap_env.errors import ChecksumError, ModelNotAvailableError, RapError
from rap_env.levels import WEIGHT_LEVELS
from rap_env.models.device import synchronise
from rap_env.plan import Plan, with_lowest_caches
from rap_env.runtime.memory_estimator import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser
from rap_env.runtime.records import Trigger

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Seconds between two looks at weights that could not be read."""
_UNREADABLE = (ChecksumError, ModelNotAvailableError)
_ATTEMPTS = 4  # at making a plan fit by measured bytes


def lowers_nothing(plan: Plan, before: Plan) -> bool:
    """Whether no item has a lower level in a plan than it had before."""
    weights = [(level, before.weight_level(index)) for index, level in plan.weights]
    rank = WEIGHT_LEVELS.index
    return (
        plan.removed <= before.removed
        and all(rank(n) <= rank(old) for n, old in [*weights, (plan.embeddings, before.embeddings)])
        and all(
            2 * layer in before.removed or level.lowest(old := before.cache_level(layer)) == old
            for layer, level in plan.caches
        )
    )


class PlanSwitcher:
    """Applies plans until the measured bytes fit; only the thread that runs the model may call it.

    Attributes:
        rows_plan: Gives the plan with the lowest levels that rows have of caches, which may
            be lower than the plan's.
        before_switch: Called with a plan before it is applied, with the batch and its next
            pass.
        unreadable: Why the weights of a chosen plan cannot be read; empty if they can. Until
            `retry` finds that they can again, the plan is not to be raised.
        switches: How often the plan changed.
        switch_s: Seconds spent switching.
    """

    def __init__(
        self,
        chooser: PlanChooser,
        monitor: MemoryMonitor,
        clock: Callable[[], float],
    ) -> None:
        self._chooser = chooser
        self._llm = chooser.llm
        self._estimator = chooser.estimator
        self._monitor = monitor
        self._clock = clock
        self.rows_plan: Callable[[], Plan] = lambda: self._llm.plan
        self.before_switch: Callable[[Plan, BatchShape, PassSize], object] = lambda *_: None
        self.unreadable = ""
        self._unreadable_plan = Plan()
        self._retry_at_s = 0.0
        self.switches = 0
        self.switch_s = 0.0

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

    def choose(self, shape: BatchShape, limit_bytes: int, *, running: bool) -> PlanChoice | None:
        """The chooser's plan for a limit; None if running requests may not go on with it.

        Their caches may have lower levels than the plan, with which the quality floor holds
        too.
        """
        choice = self._chooser.choose(shape, limit_bytes)
        if choice is not None and running:
            of_rows = with_lowest_caches(choice.plan, self.rows_plan())
            return choice if self._chooser.allows(of_rows, shape) else None
        return choice

    def improves(self, plan: Plan, shape: BatchShape) -> bool:
        """Whether a plan is better than the present one.

        It is if it lowers nothing, else if the policy predicts a smaller rise in NLL. Without
        a prediction, more bytes count as better.
        """
        before, tokens = self._llm.plan, shape.at_least_one[1]
        if plan == before or lowers_nothing(plan, before):
            return plan != before
        rise, rise_before = (self._chooser.rise(each, tokens) for each in (plan, before))
        if rise is None or rise_before is None:
            peak_bytes = self._estimator.peak_bytes
            return peak_bytes(plan, shape) > peak_bytes(before, shape)
        return rise < rise_before

    def settle(
        self,
        choice: PlanChoice | None,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a plan; if it does not fit by measured bytes, apply smaller ones.

        If its weights cannot be read, the present plan stays, without more blocks if it does
        not fit.

        Args:
            choice: The plan to begin with; None if there is none.
            shape: The batch to serve.
            trigger: What caused it.
            next_pass: Tokens of the next pass.
            running: Whether there are cached tokens, whose levels count too.

        Returns:
            Whether one fits.
        """
        readable = True
        for _ in range(_ATTEMPTS):
            if choice is None:
                return False
            self.before_switch(choice.plan, shape, next_pass)
            readable = self._switch(choice, shape, trigger) and readable
            available = self._monitor.available_after_trim_bytes(shape, next_pass)
            if self._chooser.fits(self._llm.plan, shape, available):
                return True
            if readable:
                choice = self.choose(shape, available, running=running)
            else:
                choice = self._chooser.removing_more(self._llm.plan, shape, available)
        return False

    def remove_all(self) -> None:
        """Remove all that the guard may remove."""
        plan = self._chooser.smallest(EMPTY_BATCH, self._monitor.budget_bytes)
        choice = PlanChoice(plan, self._estimator.peak_bytes(plan, EMPTY_BATCH))
        self._switch(choice, EMPTY_BATCH, "budget_fell")

    def _note_unreadable(self, plan: Plan, error: RapError) -> None:
        self._unreadable_plan, self._retry_at_s = plan, self._clock() + RETRY_S
        if not self.unreadable:
            log.warning("The plan stays, and a try follows every %g s: %s", RETRY_S, error)
        self.unreadable = str(error)

    def _switch(self, choice: PlanChoice, shape: BatchShape, trigger: Trigger) -> bool:
        """Apply a plan, return freed memory to the system, measure, and log the change.

        Returns:
            Whether its weights can be read; else the present plan stays.
        """
        monitor, before = self._monitor, self._llm.plan
        if choice.plan == before:
            return True
        started = time.perf_counter()
        try:
            self._llm.apply(choice.plan)
        except _UNREADABLE as error:
            self._note_unreadable(choice.plan, error)
            return False
        synchronise(self._llm.device)
        monitor.trim()
        self.switches += 1
        self.switch_s += time.perf_counter() - started
        rise = self._chooser.rise(choice.plan, shape.at_least_one[1])
        log.info(
            "Plan changed (%s): %s; budget %.1f MiB, peak %.1f MiB%s.",
            trigger,
            textwrap.shorten(before.summary_of_change(choice.plan), 280) or "nothing",
            monitor.budget_bytes / 2**20,
            choice.need_bytes / 2**20,
            "" if rise is None else f", ΔNLL {rise:.4g}",
        )
        return True


IDLE_RESTORE_S = 60.0
"""Seconds without a request after which everything that fits is restored, without a
reserve."""


class Growth:
    """Raises items of the plan; arguments are those and the parts of `RuntimeController`.

    Headroom in which nothing could be raised for a batch is not tried again for that batch.

    Attributes:
        hold_s: Seconds for which headroom must last while requests run, so that the plan does
            not flap.
        spare_share: Share of the budget that is left free.
    """

    hold_s, spare_share = 2.0, 0.05

    def __init__(
        self,
        chooser: PlanChooser,
        switcher: PlanSwitcher,
        monitor: MemoryMonitor,
        clock: Callable[[], float],
    ) -> None:
        self._chooser = chooser
        self._switcher = switcher
        self._monitor = monitor
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
        if not self._raise_to(choice, shape, "room", next_pass):
            self._failure = shape, lasting + least  # with headroom for one more block

    def _raise_to(
        self, choice: PlanChoice | None, shape: BatchShape, trigger: Trigger, next_pass: PassSize
    ) -> bool:
        """Apply a choice if it is better than the present plan; return whether it is."""
        if choice is None or not self._switcher.improves(choice.plan, shape):
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
        if now - self._since_s < self.hold_s:
            return None
        least = self._least_bytes
        self._since_s, self._least_bytes = now, headroom_bytes
        return least

    def _limit_bytes(self, next_pass: PassSize) -> int:
        margin = self._monitor.margin.bytes_for(prefills=next_pass.prefills)
        return self._monitor.budget_bytes - self._reserve_bytes() - margin

    def _reserve_bytes(self) -> int:
        spare = int(self._monitor.budget_bytes * self.spare_share)
        return spare + self._monitor.borrowed_bytes

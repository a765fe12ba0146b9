"""Applies plans to a live model, records each switch, and leaves out weights it cannot read."""

from __future__ import annotations

import datetime
import logging
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rap_env.errors import RapError
from rap_env.models.device import synchronise
from rap_env.plan import Plan
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.decisions import Decision, DecisionLog, Trigger
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_change import PlanChange
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

_ATTEMPTS = 4  # at making a plan fit by measured bytes
_RECENT = 256
_RETRY_S = 5.0
_MOST_READING_S = 0.2
"""Seconds after which reading goes on at the next call only, because requests wait for it."""


class UnreadableWeights:
    """Items whose weights could not be read when a plan needed them: plans go without them.

    A warning is logged when weights are missing, and a line when all are back; not for each item
    or attempt. Any thread may read it; only the thread that runs the model changes it.

    Args:
        llm: The live model.
        clock: Gives the time in seconds.

    Attributes:
        items: Their names, those that are tried first at the beginning.
        reason: Why the first one could not be read; empty while all can be read.
    """

    def __init__(self, llm: ElasticLLM, clock: Callable[[], float]) -> None:
        self._llm = llm
        self._clock = clock
        self._retry_at_s = 0.0
        self.items: tuple[str, ...] = ()
        self.reason = ""

    @property
    def clause(self) -> str:
        """Words that qualify "plan" in messages; empty while all weights can be read."""
        return f" without {len(self.items)} items that cannot be read" if self.items else ""

    def add(self, errors: Mapping[str, RapError]) -> None:
        """Note the errors of items, as `ElasticLLM.apply_readable` returns them."""
        if not errors:
            return
        if not self.items:
            self.reason = str(next(iter(errors.values())))
            log.warning(
                "The weights of %d items cannot be read; plans go without them until they can, and "
                "a try follows every %g s: %s", len(errors), _RETRY_S, self.reason,
            )  # fmt: skip
            self._retry_at_s = self._clock() + _RETRY_S
        self.items = (*self.items, *(item for item in errors if item not in self.items))

    def without(self, plan: Plan) -> Plan:
        """A plan in which each of the items has the level that it has now, or is removed."""
        present = self._llm.plan.levels
        return plan.lower({item: present.get(item, "native") for item in self.items})

    def retry(self) -> bool:
        """Try to read items again, if it is time to; return whether one can be read.

        Plans may then use it. Other items are read at once, as long as that takes little time, and
        then at the next call. After a failure, the next item is tried `_RETRY_S` later.
        """
        if not self.items or self._clock() < self._retry_at_s:
            return False
        started, before = time.perf_counter(), len(self.items)
        while self.items and time.perf_counter() - started < _MOST_READING_S:
            first, *others = self.items
            try:
                self._llm.verify_weights(first)
            except RapError as error:
                log.debug("Still: %s", error)
                self.items = (*others, first)
                self._retry_at_s = self._clock() + _RETRY_S
                break
            self.items = tuple(others)
        if not self.items:
            self.reason = ""
            log.info("All weights can be read again.")
        return len(self.items) < before


class PlanSwitcher:
    """Applies plans until the measured bytes fit; only the thread that runs the model may call it.

    Attributes:
        unreadable: Weights that cannot be read now; plans leave them out.
        rows_plan: Gives the plan with the lowest levels that rows have of caches, where rows may
            keep lower ones than the plan has. Without it, a cache that rises or returns is computed
            again.
        switches: How often the plan changed.
        switch_s: Seconds spent switching.
        recent: The last decisions, the newest at the end.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        chooser: PlanChooser,
        estimator: MemoryEstimator,
        monitor: MemoryMonitor,
        decision_log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._estimator = estimator
        self._monitor = monitor
        self._decision_log = decision_log
        self._clock = clock
        self._refill_pending = False
        self.rows_plan: Callable[[], Plan] | None = None
        self.unreadable = UnreadableWeights(llm, clock)
        chooser.restrict = self.unreadable.without
        self.switches = 0
        self.switch_s = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    @property
    def lost_decisions(self) -> int:
        """Decisions that could not be written to the log."""
        return 0 if self._decision_log is None else self._decision_log.lost

    @property
    def last_shape(self) -> BatchShape:
        """The batch for which the plan was switched last."""
        return self.recent[-1].shape if self.recent else EMPTY_BATCH

    def present_fits(self, shape: BatchShape, limit_bytes: int) -> bool:
        """Whether the present plan fits a limit for a batch, and is allowed."""
        plan = self._llm.plan
        fits = self._estimator.peak_bytes(plan, shape) <= limit_bytes
        return fits and self._chooser.allows(plan, shape)

    def pass_estimate(self, shape: BatchShape, size: PassSize) -> PassEstimate:
        """Bytes that the next pass allocates, with the refill that a switch has made necessary."""
        plan = self._llm.plan
        estimate = self._estimator.pass_estimate(plan, shape, size)
        if not self._refill_pending:
            return estimate
        workspace = estimate.workspace + self._estimator.refill_bytes(plan, shape)
        final = self._estimator.peak_bytes(plan, shape) - self._estimator.workspace_bytes(shape)
        growth = max(estimate.growth, final - self._monitor.held.total)
        return PassEstimate(workspace, growth, estimate.prefills)

    def note_decode(self) -> None:
        """Note that a pass of all rows has ended, and with it any refill."""
        self._refill_pending = False

    def choose(self, shape: BatchShape, limit_bytes: int, *, running: bool) -> PlanChoice | None:
        """The chooser's plan for a limit, which spares `running` requests a refill of caches."""
        choice = self._chooser.choose(shape, limit_bytes)
        if choice is None or not running:
            return choice
        return self._without_refill(choice, shape, limit_bytes)

    def choose_higher(
        self, shape: BatchShape, limit_bytes: int, available_bytes: int
    ) -> PlanChoice | None:
        """The chooser's plan for headroom; one with a refill only if it pays, and is available."""
        choice = self._chooser.choose(shape, limit_bytes)
        if choice is None or not shape or not self._refills(choice.plan):
            return choice
        if self._refill_pays(choice.plan):
            limit = available_bytes - self._estimator.refill_bytes(choice.plan, shape)
            if choice.need_bytes > limit:
                choice = self._chooser.choose(shape, limit)
            if choice is None or self._refill_pays(choice.plan):
                return choice
        return self._without_refill(choice, shape, limit_bytes)

    def improves(self, choice: PlanChoice, shape: BatchShape) -> bool:
        """Whether a choice is better than the present plan.

        It is if it lowers nothing, else if the policy predicts a smaller rise in NLL. Without a
        prediction, more bytes count as better.
        """
        plan, before = choice.plan, self._llm.plan
        if plan == before:
            return False
        if plan.removed <= before.removed and not self._lowered_items(plan, shape):
            return True
        tokens = shape.at_least_one[1]
        rise = self._chooser.delta_nll(plan, tokens, shape.text_shares)
        rise_before = self._chooser.delta_nll(before, tokens, shape.text_shares)
        if rise is None or rise_before is None:
            return choice.need_bytes > self._estimator.peak_bytes(before, shape)
        return rise < rise_before

    def settle(
        self,
        choice: PlanChoice,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a plan; if it does not fit by measured bytes, apply smaller ones.

        Args:
            choice: The plan to begin with.
            shape: The batch to serve.
            trigger: What caused it.
            next_pass: Tokens of the next pass.
            running: Whether there are cached tokens, which a refill would compute again.

        Returns:
            Whether one fits.
        """
        attempt: PlanChoice | None = choice
        for _ in range(_ATTEMPTS):
            if attempt is None:
                return False
            self._switch(attempt, shape, trigger, running=running)
            estimate = self.pass_estimate(shape, next_pass)
            available = self._monitor.available_after_trim_bytes(shape, estimate)
            if self.present_fits(shape, available):
                return True
            attempt = self.choose(shape, available, running=running)
        return False

    def remove_all(self) -> None:
        """Remove all that the guard may remove."""
        plan = self._chooser.smallest(EMPTY_BATCH, self._monitor.budget_bytes)
        choice = PlanChoice(plan, self._estimator.peak_bytes(plan, EMPTY_BATCH), guarded=True)
        self._switch(choice, EMPTY_BATCH, "budget_fell", running=False)

    def _without_refill(
        self, choice: PlanChoice, shape: BatchShape, limit_bytes: int
    ) -> PlanChoice | None:
        """Change a choice so that no cache has to be computed again; None if that is not allowed.

        In exchange for what stays lowered, as many of the newly removed and lowered items stay as
        they are as fit.
        """
        change = self._change_to(choice.plan)
        if self.rows_plan is not None:
            change = PlanChange(self.rows_plan(), choice.plan)
        plan = change.without_refill()
        if not self._refills(choice.plan) and self._chooser.allows(plan, shape):
            return choice
        for item in self._lowered_items(plan, shape):
            with_item = self._change_to(plan).with_item_before(item)
            if self._estimator.peak_bytes(with_item, shape) <= limit_bytes:
                plan = with_item
        if not self._chooser.allows(plan, shape):
            return None
        need_bytes = self._estimator.peak_bytes(plan, shape)
        return PlanChoice(plan, need_bytes, guarded=True, decision_s=choice.decision_s)

    def _lowered_items(self, plan: Plan, shape: BatchShape) -> list[str]:
        order = self._chooser.guard_order(shape)
        return self._change_to(plan).lowered_items(self._estimator.memory.facts, order)

    def _change_to(self, plan: Plan) -> PlanChange:
        return PlanChange(self._llm.plan, plan)

    def _refills(self, plan: Plan) -> bool:
        """Whether caches of all rows have to be computed again for a plan."""
        change = self._change_to(plan)
        return self.rows_plan is None and (change.returns_attention or change.raises_caches)

    def _refill_pays(self, plan: Plan) -> bool:
        """Whether what a refill raises costs more quality than a pass is worth.

        That holds for removed attention blocks and for caches of 2 bits, not for better ones.
        """
        change = self._change_to(plan)
        return change.returns_attention or change.raises_two_bits

    def _switch(
        self, choice: PlanChoice, shape: BatchShape, trigger: Trigger, *, running: bool
    ) -> None:
        """Apply a plan, return freed memory to the system, measure, and record the decision."""
        monitor, before = self._monitor, self._llm.plan
        if choice.plan == before:
            return
        self._refill_pending |= running and self._refills(choice.plan)
        bytes_before, started = monitor.used_bytes, time.perf_counter()
        self.unreadable.add(self._llm.apply_readable(choice.plan))
        synchronise(self._llm.device)
        monitor.trim()
        seconds = time.perf_counter() - started
        self.switches += 1
        self.switch_s += seconds
        decision = Decision(
            time_s=self._clock(),
            wall_time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            trigger=trigger,
            before=before,
            after=self._llm.plan,
            bytes_before=bytes_before,
            bytes_after=monitor.used_bytes,
            budget_bytes=monitor.budget_bytes,
            shape=shape,
            decision_s=choice.decision_s,
            switch_s=seconds,
            guarded=choice.guarded,
        )
        rise = self._chooser.rise(decision.after, shape.at_least_one[1], shape.text_shares)
        log.info(
            "Plan changed (%s): %s; budget %.1f MiB, peak %.1f MiB%s.",
            trigger, textwrap.shorten(before.summary_of_change(decision.after), 280) or "nothing",
            monitor.budget_bytes / 2**20, choice.need_bytes / 2**20,
            "" if rise is None else f", ΔNLL {rise:.4g}",
        )  # fmt: skip
        self.recent.append(decision)
        if self._decision_log is not None:
            self._decision_log.append(decision)

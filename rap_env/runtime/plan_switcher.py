"""Applies plans to a live model until the measured bytes fit, and records each switch."""

from __future__ import annotations

import datetime
import logging
import textwrap
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rap_env.errors import ChecksumError, ModelNotAvailableError, RapError
from rap_env.levels import WeightLevel
from rap_env.model_facts import ModelFacts
from rap_env.models.device import synchronise
from rap_env.plan import EMBEDDINGS, Plan, block_index, block_name, cache_name
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser
from rap_env.runtime.records import Decision, DecisionLog, Trigger

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Seconds after which a plan is raised again whose weights could not be read."""
_ATTEMPTS = 4  # at making a plan fit by measured bytes
_RECENT = 256


@dataclass(frozen=True)
class PlanChange:
    """A change from the plan `before` to the plan `after`."""

    before: Plan
    after: Plan

    def without_refill(self) -> Plan:
        """The plan `after`, in which attention stays removed and caches keep their lower level."""
        caches = dict(self.after.caches) | {
            layer: level.lowest(self.after.cache_level(layer))
            for layer, level in self.before.caches
        }
        staying = {index for index in self.before.removed - self.after.removed if index % 2 == 0}
        removed = self.after.removed | staying
        return replace(self.after, caches=tuple(caches.items()), removed=removed)

    def lowered_items(self, facts: ModelFacts, order: Sequence[int]) -> list[str]:
        """Items that are lower than before, by the sizes of levels in `facts`.

        Removed blocks come first, the last in `order` before the others.
        """
        before, after = self.before, self.after
        removed = [i for i in reversed(order) if i in after.removed - before.removed]
        weights = [i for i, level in after.weights if _is_lower(facts, i, level, before)]
        caches = [
            n
            for n, level in after.caches
            if 2 * n not in before.removed
            and before.cache_level(n).lowest(level) != before.cache_level(n)
        ]
        sizes = facts.embedding_levels
        embeddings = [EMBEDDINGS] if sizes[after.embeddings] < sizes[before.embeddings] else []
        return [*map(block_name, (*removed, *weights)), *embeddings, *map(cache_name, caches)]

    def with_item_before(self, item: str) -> Plan:
        """The plan `after`, in which one item has its level of before, its cache if it returns."""
        items = [item]
        if self.after.levels.get(item) == "removed" and item.endswith(".attn"):
            items.append(cache_name(block_index(item) // 2))
        levels = self.before.levels
        changed = self.after.levels | {name: levels.get(name, "native") for name in items}
        return Plan.of({name: level for name, level in changed.items() if level != "native"})


def _is_lower(facts: ModelFacts, index: int, level: WeightLevel, before: Plan) -> bool:
    sizes = facts.weight_levels(index)
    return sizes[level] < sizes[before.weight_level(index)]


class PlanSwitcher:
    """Applies plans until the measured bytes fit; only the thread that runs the model may call it.

    Attributes:
        rows_plan: Gives the plan with the lowest levels that rows have of caches, which may be
            lower than the plan's.
        unreadable: Why the weights of a chosen plan cannot be read; empty if they can. The plan
            stays as it is then, or without more blocks; it is not raised for `RETRY_S`.
        switches: How often the plan changed.
        switch_s: Seconds spent switching.
        recent: The last decisions, the newest at the end.
    """

    def __init__(
        self,
        chooser: PlanChooser,
        monitor: MemoryMonitor,
        decision_log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._chooser = chooser
        self._llm = chooser.llm
        self._estimator = chooser.estimator
        self._monitor = monitor
        self._decision_log = decision_log
        self._clock = clock
        self.rows_plan: Callable[[], Plan] = lambda: self._llm.plan
        self.unreadable = ""
        self._retry_at_s = float("-inf")
        self.switches = 0
        self.switch_s = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    @property
    def may_raise(self) -> bool:
        """Whether plans may be raised: always, unless weights could not be read just now."""
        return self._clock() >= self._retry_at_s

    @property
    def lost_decisions(self) -> int:
        """Decisions that could not be written to the log."""
        return 0 if self._decision_log is None else self._decision_log.lost

    @property
    def last_shape(self) -> BatchShape:
        """The batch for which the plan was switched last."""
        return self.recent[-1].shape if self.recent else EMPTY_BATCH

    def choose(self, shape: BatchShape, limit_bytes: int, *, running: bool) -> PlanChoice | None:
        """The chooser's plan for a limit, which the caches of `running` requests allow too."""
        choice = self._chooser.choose(shape, limit_bytes)
        if choice is None or not running:
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
        choice: PlanChoice | None,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a plan; if it does not fit by measured bytes, apply smaller ones.

        If its weights cannot be read, the present plan stays, without more blocks if it does not
        fit.

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
            readable = self._switch(choice, shape, trigger) and readable
            available = self._monitor.available_after_trim_bytes(shape, next_pass)
            if self._chooser.fits(self._llm.plan, shape, available):
                if readable and trigger != "budget_fell":
                    self._note_readable()
                return True
            if readable:
                choice = self.choose(shape, available, running=running)
            else:
                choice = self._chooser.removing_more(self._llm.plan, shape, available)
        return False

    def remove_all(self) -> None:
        """Remove all that the guard may remove."""
        plan = self._chooser.smallest(EMPTY_BATCH, self._monitor.budget_bytes)
        choice = PlanChoice(plan, self._estimator.peak_bytes(plan, EMPTY_BATCH), guarded=True)
        self._switch(choice, EMPTY_BATCH, "budget_fell")

    def _without_refill(
        self, choice: PlanChoice, shape: BatchShape, limit_bytes: int
    ) -> PlanChoice | None:
        """Change a choice that is not allowed with the levels that rows keep; None without one.

        In exchange for what stays lowered, as many of the newly removed and lowered items stay as
        they are as fit.
        """
        plan = PlanChange(self.rows_plan(), choice.plan).without_refill()
        if self._chooser.allows(plan, shape):
            return choice
        for item in self._lowered_items(plan, shape):
            with_item = PlanChange(self._llm.plan, plan).with_item_before(item)
            if self._estimator.peak_bytes(with_item, shape) <= limit_bytes:
                plan = with_item
        if not self._chooser.allows(plan, shape):
            return None
        need_bytes = self._estimator.peak_bytes(plan, shape)
        return PlanChoice(plan, need_bytes, guarded=True, decision_s=choice.decision_s)

    def _lowered_items(self, plan: Plan, shape: BatchShape) -> list[str]:
        order = self._chooser.guard_order(shape)
        change = PlanChange(self._llm.plan, plan)
        return change.lowered_items(self._estimator.memory.facts, order)

    def _note_unreadable(self, error: RapError) -> None:
        self._retry_at_s = self._clock() + RETRY_S
        if not self.unreadable:
            log.warning("The plan stays, and a try follows every %g s: %s", RETRY_S, error)
        self.unreadable = str(error)

    def _note_readable(self) -> None:
        if self.unreadable:
            log.info("The weights of the plan can be read again.")
        self.unreadable = ""

    def _switch(self, choice: PlanChoice, shape: BatchShape, trigger: Trigger) -> bool:
        """Apply a plan, return freed memory to the system, measure, and record the decision.

        Returns:
            Whether its weights can be read; else the present plan stays.
        """
        monitor, before = self._monitor, self._llm.plan
        if choice.plan == before:
            return not self.unreadable
        bytes_before, started = monitor.used_bytes, time.perf_counter()
        try:
            self._llm.apply(choice.plan)
        except (ChecksumError, ModelNotAvailableError) as error:
            self._note_unreadable(error)
            return False
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
        return True

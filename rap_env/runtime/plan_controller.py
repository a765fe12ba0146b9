"""Chooses a live model's plan: lowers items immediately, raises them after a debounce."""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.blocks import block_index, block_name
from rap_env.levels import WeightLevel
from rap_env.models.device import synchronise
from rap_env.plan import EMBEDDINGS, Plan, cache_name
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape, PassSize
from rap_env.runtime.decisions import Decision, DecisionLog, Trigger
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import PlanChoice, PlanChooser
from rap_env.runtime.unreadable_weights import UnreadableWeights

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

_ATTEMPTS = 4  # at making a plan fit by measured bytes
_RECENT = 256


class Debounce:
    """Reports headroom only after it has lasted for `hold_s`, so that the plan does not flap."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._since_s: float | None = None
        self._least_bytes = 0

    def update(self, time_s: float, headroom_bytes: int, wanted_bytes: int) -> int | None:
        """Take in the headroom of now.

        Args:
            time_s: The time.
            headroom_bytes: Free bytes.
            wanted_bytes: Least headroom that is of use; less restarts the wait.

        Returns:
            Bytes that were free throughout, once `hold_s` has passed (then a new wait begins);
            else None.
        """
        if headroom_bytes < wanted_bytes:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s, self._least_bytes = time_s, headroom_bytes
        self._least_bytes = min(self._least_bytes, headroom_bytes)
        if time_s - self._since_s < self._hold_s:
            return None
        least = self._least_bytes
        self._since_s, self._least_bytes = time_s, headroom_bytes
        return least

    def reset(self) -> None:
        """Restart the wait."""
        self._since_s = None


class PlanController:
    """Applies the plans of a chooser until the measured bytes fit, and raises items later.

    The settings are those of `RuntimeController`.

    Attributes:
        unreadable: Weights that cannot be read now; plans leave them out.
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
        *,
        hysteresis_share: float,
        hold_s: float,
        decision_log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._estimator = estimator
        self._monitor = monitor
        self._hysteresis_share = hysteresis_share
        self._decision_log = decision_log
        self._clock = clock
        self._debounce = Debounce(hold_s)
        self._retry_above: tuple[BatchShape, int] | None = None  # less headroom raises nothing
        self._switched_for = EMPTY_BATCH
        self._refill_pending = False
        self.unreadable = UnreadableWeights(llm, clock)
        chooser.restrict = self.unreadable.without
        self.switches = 0
        self.switch_s = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    @property
    def lost_decisions(self) -> int:
        """Decisions that could not be written to the log."""
        return 0 if self._decision_log is None else self._decision_log.lost

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

    def retry_unreadable(self) -> bool:
        """Try to read missing weights again, now and then; return whether some are back."""
        if not self.unreadable.retry():
            return False
        self._retry_above = None
        return True

    def fit(
        self,
        shape: BatchShape,
        available_bytes: int,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a plan that needs no more than is available; return whether one fits.

        Args:
            shape: The batch to serve.
            available_bytes: Most bytes that the plan may need.
            trigger: What caused it.
            next_pass: Tokens of the next pass.
            running: Whether there are cached tokens, which a refill would compute again.
        """
        self._debounce.reset()
        choice = self._chooser.choose(shape, available_bytes)
        if choice is not None and running:
            choice = self._without_refill(choice, shape, available_bytes)
        return choice is not None and self._settle(choice, shape, trigger, next_pass, running)

    def remove_all(self) -> None:
        """Remove all that the guard may remove: nothing is left to preempt."""
        plan = self._chooser.smallest(EMPTY_BATCH, self._monitor.budget_bytes)
        choice = PlanChoice(plan, self._estimator.peak_bytes(plan, EMPTY_BATCH), guarded=True)
        self._switch(choice, EMPTY_BATCH, "budget_fell", running=False)

    def grow_at_arrival(self, need_bytes: int, shape: BatchShape, next_pass: PassSize) -> None:
        """Apply the policy's plan if it fits and is better than the present one."""
        choice = self._chooser.choose(shape, self._growth_limit_bytes(next_pass))
        if choice is not None and self._improves(choice, need_bytes, shape):
            self._settle(choice, shape, "arrival", next_pass, running=False)

    def grow(self, need_bytes: int, shape: BatchShape, next_pass: PassSize) -> None:
        """Raise items once there has been headroom above the present need long enough."""
        headroom = self._growth_limit_bytes(next_pass) - need_bytes
        least = self._estimator.least_raise_bytes(self._llm.plan, shape)
        lasting = self._debounce.update(self._clock(), headroom, least)
        if lasting is None or (
            self._retry_above and self._retry_above[0] == shape and lasting < self._retry_above[1]
        ):
            return
        available = self._available_bytes(shape, next_pass) - self._reserve_bytes()
        choice = self._grown(shape, min(need_bytes + lasting, available), available)
        if choice is not None and self._improves(choice, need_bytes, shape):
            left = shape.tokens < self._switched_for.tokens
            trigger: Trigger = "left" if left else "room"
            self._settle(choice, shape, trigger, next_pass, running=bool(shape))
        else:  # ask again when there is headroom for one more block
            self._retry_above = (shape, lasting + least)

    def restore_idle(self, need_bytes: int, next_pass: PassSize) -> None:
        """While nothing runs, raise all items that fit, without a reserve or a debounce."""
        available = self._available_bytes(EMPTY_BATCH, next_pass)
        choice = self._chooser.choose(EMPTY_BATCH, available)
        if choice is not None and self._improves(choice, need_bytes, EMPTY_BATCH):
            self._settle(choice, EMPTY_BATCH, "room", next_pass, running=False)

    def _available_bytes(self, shape: BatchShape, next_pass: PassSize) -> int:
        """Bytes that a plan may need, by what is measured after a trim."""
        self._monitor.trim()
        estimate = self.pass_estimate(shape, next_pass)
        return self._monitor.available_after_trim_bytes(shape, estimate)

    def _grown(self, shape: BatchShape, limit_bytes: int, available: int) -> PlanChoice | None:
        """The policy's plan for headroom; one with a refill only if it pays and fits."""
        choice = self._chooser.choose(shape, limit_bytes)
        if choice is None or not shape or not self._refills(choice.plan):
            return choice
        if self._refill_pays(choice.plan):
            limit = available - self._estimator.refill_bytes(choice.plan, shape)
            if choice.need_bytes > limit:
                choice = self._chooser.choose(shape, limit)
            if choice is None or self._refill_pays(choice.plan):
                return choice
        return self._without_refill(choice, shape, limit_bytes)

    def _reserve_bytes(self) -> int:
        return int(self._monitor.budget_bytes * self._hysteresis_share)

    def _growth_limit_bytes(self, next_pass: PassSize) -> int:
        monitor = self._monitor
        margin = monitor.margin.bytes_for(prefills=next_pass.prefills)
        return monitor.budget_bytes - self._reserve_bytes() - margin

    def _without_refill(
        self, choice: PlanChoice, shape: BatchShape, limit_bytes: int
    ) -> PlanChoice | None:
        """Change a choice so that no cache has to be computed again; None if that is not allowed.

        Attention blocks that would return stay removed, and lowered caches keep their level. In
        exchange, as many of the newly removed and lowered items stay as they are as fit.
        """
        before = self._llm.plan
        if not self._refills(choice.plan):
            return choice
        returning = {i for i in before.removed - choice.plan.removed if i % 2 == 0}
        lower = [(layer, level.lowest(choice.plan.cache_level(layer)))
                 for layer, level in before.caches]  # fmt: skip
        plan = replace(
            choice.plan,
            removed=choice.plan.removed | returning,
            caches=(*(p for p in choice.plan.caches if p[0] not in dict(lower)), *lower),
        )
        for item in self._newly_lowered(plan, shape):
            kept = _with_level_of(plan, before, item)
            if self._estimator.peak_bytes(kept, shape) <= limit_bytes:
                plan = kept
        if not self._chooser.allows(plan, shape):
            return None
        need_bytes = self._estimator.peak_bytes(plan, shape)
        return PlanChoice(plan, need_bytes, guarded=True, decision_s=choice.decision_s)

    def _newly_lowered(self, plan: Plan, shape: BatchShape) -> list[str]:
        """Items that a plan lowers below the present one: removed blocks, weights, caches."""
        before = self._llm.plan
        order = list(reversed(self._chooser.guard_order(shape)))
        removed = [i for i in order if i in plan.removed - before.removed]
        weights = [i for i, level in plan.weights if self._is_lower(i, level)]
        caches = [n for n, level in plan.caches if 2 * n not in before.removed
                  and before.cache_level(n).lowest(level) != before.cache_level(n)]  # fmt: skip
        sizes = self._estimator.memory.facts.embedding_levels
        embeddings = [EMBEDDINGS] if sizes[plan.embeddings] < sizes[before.embeddings] else []
        return [*map(block_name, (*removed, *weights)), *embeddings, *map(cache_name, caches)]

    def _is_lower(self, index: int, level: WeightLevel) -> bool:
        sizes = self._estimator.memory.facts.weight_levels(index)
        return sizes[level] < sizes[self._llm.plan.weight_level(index)]

    def _improves(self, choice: PlanChoice, need_bytes: int, shape: BatchShape) -> bool:
        """Whether a choice is better than the present plan, which needs `need_bytes`.

        It is if it lowers nothing, else if the policy predicts a smaller rise in NLL. Without a
        prediction, more bytes count as better.
        """
        plan, before = choice.plan, self._llm.plan
        if plan == before:
            return False
        if plan.removed <= before.removed and not self._newly_lowered(plan, shape):
            return True
        tokens = shape.at_least_one[1]
        rise, rise_before = (
            self._chooser.delta_nll(one, tokens, shape.text_shares) for one in (plan, before)
        )
        if rise is None or rise_before is None:
            return choice.need_bytes > need_bytes
        return bool(rise < rise_before)

    def _settle(
        self,
        choice: PlanChoice,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
        running: bool,
    ) -> bool:
        """Apply a plan; if it does not fit by measured bytes, try smaller ones."""
        attempt: PlanChoice | None = choice
        for _ in range(_ATTEMPTS):
            if attempt is None:
                return False
            self._switch(attempt, shape, trigger, running=running)
            estimate = self.pass_estimate(shape, next_pass)
            available = self._monitor.available_after_trim_bytes(shape, estimate)
            need_bytes, plan = attempt.need_bytes, self._llm.plan
            if plan != attempt.plan:  # weights could not be read
                need_bytes = self._estimator.peak_bytes(plan, shape)
            if need_bytes <= available and self._chooser.allows(plan, shape):
                return True
            attempt = self._chooser.choose(shape, available)
            if attempt is not None and running:
                attempt = self._without_refill(attempt, shape, available)
        return False

    def _refills(self, plan: Plan) -> bool:
        """Whether a plan returns attention blocks or raises caches of those that are kept."""
        before = self._llm.plan
        return self._returns_attention(plan) or any(
            level.lowest(plan.cache_level(layer)) != plan.cache_level(layer)
            for layer, level in before.caches
            if 2 * layer not in plan.removed
        )

    def _refill_pays(self, plan: Plan) -> bool:
        """Whether what a refill raises costs more quality than a pass is worth.

        That holds for removed attention blocks and for caches of 2 bits, not for better ones.
        """
        return self._returns_attention(plan) or any(
            level.bits == 2 and plan.cache_level(layer).bits > 2
            for layer, level in self._llm.plan.caches
            if 2 * layer not in plan.removed
        )

    def _returns_attention(self, plan: Plan) -> bool:
        return any(index % 2 == 0 for index in self._llm.plan.removed - plan.removed)

    def _switch(
        self, choice: PlanChoice, shape: BatchShape, trigger: Trigger, *, running: bool
    ) -> None:
        """Apply a plan, return freed memory to the system, measure, and record the decision."""
        monitor, before = self._monitor, self._llm.plan
        if choice.plan == before:
            return
        refills = self._refill_pending or (running and self._refills(choice.plan))
        bytes_before, started = monitor.used_bytes, time.perf_counter()
        self.unreadable.add(self._llm.apply_readable(choice.plan))
        synchronise(*self._llm.devices)
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
        self.recent.append(decision)
        if self._decision_log is not None:
            self._decision_log.append(decision)
        self._refill_pending = refills
        self._debounce.reset()
        self._switched_for = shape
        self._retry_above = None


def _with_level_of(plan: Plan, other: Plan, item: str) -> Plan:
    """A plan in which one item has its level in another plan, with its cache if it returns."""
    items = [item]
    if plan.levels.get(item) == "removed" and item.endswith(".attn"):
        items.append(cache_name(block_index(item) // 2))
    levels = plan.levels | {name: other.levels.get(name, "native") for name in items}
    return Plan.of({name: value for name, value in levels.items() if value != "native"})

"""Chooses a live model's mask: removes blocks immediately, restores them after a debounce."""

from __future__ import annotations

import datetime
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.plan import as_plan
from rap_env.policy import PlanPolicy
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.decisions import Decision, DecisionLog, Trigger
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate, PassSize
from rap_env.runtime.memory_monitor import MemoryMonitor

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

log = logging.getLogger(__name__)

_ATTEMPTS = 4  # at making a mask fit by measured bytes
_RECENT = 256


@dataclass(frozen=True)
class MaskChoice:
    """A mask that fits."""

    mask: BlockMask
    need_bytes: int
    guarded: bool
    decision_s: float = 0.0


class Debounce:
    """Reports headroom only after it has lasted for `hold_s`, so that the mask does not flap."""

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


class MaskController:
    """Asks a policy for masks, makes them fit, and applies them until the measured bytes fit.

    Where the policy's mask does not fit, the guard removes more blocks in its own order. The
    settings are those of `RuntimeController`.

    Attributes:
        decisions: How often the policy was asked.
        decision_s: Seconds spent choosing masks.
        switches: How often the mask changed.
        switch_s: Seconds spent switching.
        recent: The last decisions, the newest at the end.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        policy: PlanPolicy,
        estimator: MemoryEstimator,
        monitor: MemoryMonitor,
        *,
        guard_order: Sequence[int] | None,
        hysteresis_share: float,
        hold_s: float,
        decision_log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self.policy = policy
        self._estimator = estimator
        self._monitor = monitor
        self._hysteresis_share = hysteresis_share
        self._decision_log = decision_log
        self._clock = clock
        if guard_order is None:
            guard_order = getattr(policy, "order", None)
        self._order = None if guard_order is None else tuple(guard_order)
        self._guards = self._order != ()
        BlockMask.of(*(self._order or ())).check(llm.num_blocks)
        self._debounce = Debounce(hold_s)
        self._retry_above: tuple[BatchShape, int] | None = None  # less headroom adds no block
        self._switched_for = EMPTY_BATCH
        self._refill_pending = False
        self.decisions = self.switches = 0
        self.decision_s = self.switch_s = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    def pass_estimate(self, shape: BatchShape, size: PassSize) -> PassEstimate:
        """Bytes that the next pass allocates, with the refill of attention blocks that returned."""
        mask = self._llm.mask
        estimate = self._estimator.pass_estimate(mask, shape, size)
        if not self._refill_pending:
            return estimate
        workspace = estimate.workspace + self._estimator.refill_bytes(mask, shape)
        final = self._estimator.peak_bytes(mask, shape) - self._estimator.workspace_bytes(shape)
        return PassEstimate(workspace, max(estimate.growth, final - self._monitor.held.total))

    def note_decode(self) -> None:
        """Note that a pass of all rows has ended, and with it any refill."""
        self._refill_pending = False

    def fit(
        self,
        shape: BatchShape,
        available_bytes: int,
        trigger: Trigger,
        next_pass: PassSize,
        *,
        running: bool,
    ) -> bool:
        """Apply a mask that needs no more than is available; return whether one fits.

        Args:
            shape: The batch to serve.
            available_bytes: Most bytes that the mask may need.
            trigger: What caused it.
            next_pass: Tokens of the next pass.
            running: Whether there are cached tokens, which a refill would compute again.
        """
        self._debounce.reset()
        choice = self._choose(shape, available_bytes)
        if choice is not None and running:
            choice = self._without_refill(choice, shape, available_bytes)
        return choice is not None and self._settle(choice, shape, trigger, next_pass, running)

    def remove_all(self) -> None:
        """Remove all that the guard may remove: nothing is left to preempt."""
        mask = self._smallest(EMPTY_BATCH, self._monitor.budget_bytes)
        choice = MaskChoice(mask, self._estimator.peak_bytes(mask, EMPTY_BATCH), guarded=True)
        self._switch(choice, EMPTY_BATCH, "budget_fell", running=False)

    def grow_at_arrival(self, need_bytes: int, shape: BatchShape, next_pass: PassSize) -> None:
        """Apply the policy's mask if it fits and needs more than the present one, `need_bytes`."""
        choice = self._choose(shape, self._growth_limit_bytes())
        if choice is not None and choice.need_bytes > need_bytes:
            self._settle(choice, shape, "arrival", next_pass, running=False)

    def grow(self, need_bytes: int, shape: BatchShape, next_pass: PassSize) -> None:
        """Restore blocks once there has been headroom above the present need long enough."""
        monitor = self._monitor
        headroom = self._growth_limit_bytes() - need_bytes
        freed = self._estimator.freed_bytes(shape)
        least = max(1, min(freed[index] for index in self._llm.mask.indices))
        lasting = self._debounce.update(self._clock(), headroom, least)
        if lasting is None or (
            self._retry_above and self._retry_above[0] == shape and lasting < self._retry_above[1]
        ):
            return
        monitor.trim()
        estimate = self.pass_estimate(shape, next_pass)
        available = monitor.available_after_trim_bytes(shape, estimate) - self._reserve_bytes()
        choice = self._choose(shape, min(need_bytes + lasting, available))
        if choice is not None and shape and self._returns_attention(choice):
            limit = available - self._estimator.refill_bytes(choice.mask, shape)
            if choice.need_bytes > limit:
                choice = self._choose(shape, limit)
        if choice is not None and choice.need_bytes > need_bytes:
            left = shape.tokens < self._switched_for.tokens
            trigger: Trigger = "left" if left else "room"
            self._settle(choice, shape, trigger, next_pass, running=bool(shape))
        else:  # ask again when there is headroom for one more block
            self._retry_above = (shape, lasting + least)

    def _reserve_bytes(self) -> int:
        return int(self._monitor.budget_bytes * self._hysteresis_share)

    def _growth_limit_bytes(self) -> int:
        monitor = self._monitor
        return monitor.budget_bytes - self._reserve_bytes() - monitor.margin.bytes

    def guard_order(self, shape: BatchShape) -> Sequence[int]:
        """Indices of the blocks that the guard may remove, in the order of removal."""
        if self._order is not None:
            return self._order
        freed = self._estimator.freed_bytes(shape)
        return sorted(range(len(freed)), key=lambda index: -freed[index])

    def smallest_bytes(self, shape: BatchShape, limit_bytes: int) -> int:
        """Bytes that the smallest mask for a batch needs."""
        return self._estimator.peak_bytes(self._smallest(shape, limit_bytes), shape)

    def _smallest(self, shape: BatchShape, limit_bytes: int) -> BlockMask:
        """The mask that leaves least: all that the guard may remove, or the policy's mask."""
        if self._guards:
            return BlockMask.of(*self.guard_order(shape))
        return self._ask_policy(shape, limit_bytes)

    def _choose(self, shape: BatchShape, limit_bytes: int) -> MaskChoice | None:
        """The policy's mask for a batch, made to fit a limit; None if no mask fits it."""
        started = time.perf_counter()
        mask = None
        guarded = False
        if not self._guards or self.smallest_bytes(shape, limit_bytes) <= limit_bytes:
            self.decisions += 1
            wanted = self._ask_policy(shape, limit_bytes)
            order = self.guard_order(shape)
            mask = self._estimator.shrink_to_fit(wanted, order, shape, limit_bytes)
            guarded = mask != wanted
        seconds = time.perf_counter() - started
        self.decision_s += seconds
        if mask is None:
            return None
        return MaskChoice(mask, self._estimator.peak_bytes(mask, shape), guarded, seconds)

    def _ask_policy(self, shape: BatchShape, limit_bytes: int) -> BlockMask:
        """The policy's mask; the dense one if the policy fails."""
        try:
            mask = as_plan(self.policy.choose(shape.request(limit_bytes))).removed
            return mask.check(self._llm.num_blocks)
        except Exception:
            log.exception("Policy %r failed; the guard chooses the mask.", self.policy.name)
            return BlockMask()

    def _without_refill(
        self, choice: MaskChoice, shape: BatchShape, limit_bytes: int
    ) -> MaskChoice:
        """Change a choice so that no attention block returns, which would refill its cache.

        Those blocks stay removed. In exchange, as many of the newly removed blocks stay as fit.
        """
        before = self._llm.mask
        returning = {index for index in (before - choice.mask).indices if index % 2 == 0}
        if not returning:
            return choice
        mask = choice.mask | BlockMask(frozenset(returning))
        for index in reversed(self.guard_order(shape)):
            if index not in mask or index in before:
                continue
            fewer = mask - BlockMask.of(index)
            if self._estimator.peak_bytes(fewer, shape) <= limit_bytes:
                mask = fewer
        need_bytes = self._estimator.peak_bytes(mask, shape)
        return MaskChoice(mask, need_bytes, guarded=True, decision_s=choice.decision_s)

    def _settle(
        self,
        choice: MaskChoice,
        shape: BatchShape,
        trigger: Trigger,
        next_pass: PassSize,
        running: bool,
    ) -> bool:
        """Apply a mask; if it does not fit by measured bytes, try smaller ones."""
        attempt: MaskChoice | None = choice
        for _ in range(_ATTEMPTS):
            if attempt is None:
                return False
            self._switch(attempt, shape, trigger, running=running)
            estimate = self.pass_estimate(shape, next_pass)
            available = self._monitor.available_after_trim_bytes(shape, estimate)
            if attempt.need_bytes <= available:
                return True
            attempt = self._choose(shape, available)
        return False

    def _returns_attention(self, choice: MaskChoice) -> bool:
        return (self._llm.mask - choice.mask).count("attn") > 0

    def _switch(
        self, choice: MaskChoice, shape: BatchShape, trigger: Trigger, *, running: bool
    ) -> None:
        """Apply a mask, return freed memory to the system, measure, and record the decision."""
        monitor, before = self._monitor, self._llm.mask
        if choice.mask == before:
            return
        refills = self._refill_pending or (running and self._returns_attention(choice))
        bytes_before, started = monitor.used_bytes, time.perf_counter()
        self._llm.apply(choice.mask)
        monitor.trim()
        seconds = time.perf_counter() - started
        self.switches += 1
        self.switch_s += seconds
        decision = Decision(
            time_s=self._clock(),
            wall_time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            trigger=trigger,
            before=before,
            after=choice.mask,
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

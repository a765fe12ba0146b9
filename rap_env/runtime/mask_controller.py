"""Moves a live model from mask to mask: down at once, up with patience."""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.decisions import Decision, DecisionLog, Why
from rap_env.runtime.mask_choice import MaskChoice, MaskChooser
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate
from rap_env.runtime.memory_monitor import MemoryMonitor

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM


class Debounce:
    """Watches for room that lasts.

    Args:
        hold_s: Seconds for which there must have been room.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._since: float | None = None
        self._least = 0

    def held(self, time_s: float, spare_bytes: int, wanted_bytes: int) -> int | None:
        """Take in how much is free now.

        Args:
            time_s: The time.
            spare_bytes: Bytes that are free.
            wanted_bytes: Less than this is no room.

        Returns:
            Bytes that were free all the time, once that is long enough; then a new time begins.
        """
        if spare_bytes < wanted_bytes:
            self._since = None
            return None
        if self._since is None:
            self._since, self._least = time_s, spare_bytes
        self._least = min(self._least, spare_bytes)
        if time_s - self._since < self._hold_s:
            return None
        least = self._least
        self._since, self._least = time_s, spare_bytes
        return least

    def close(self) -> None:
        """There is no room now."""
        self._since = None


_RECENT = 256


class MaskSwitcher:
    """Switches masks.

    Args:
        llm: The live model.
        monitor: Measures before and after.
        log: Where to log decisions, if anywhere.
        clock: Gives the time in seconds, for the log.

    Attributes:
        count: How often the mask changed.
        seconds: Seconds spent on it.
        recent: The last decisions.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        monitor: MemoryMonitor,
        log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._monitor = monitor
        self._log = log
        self._clock = clock
        self.count = 0
        self.seconds = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    def switch(self, choice: MaskChoice, shape: BatchShape, why: Why) -> bool:
        """Apply a mask, give what was freed back to the system, and measure.

        Args:
            choice: The mask.
            shape: What it is for.
            why: What gave rise to it.

        Returns:
            Whether it is another mask than before.

        Raises:
            RapError: The model cannot do it; see `ElasticLLM.apply`.
        """
        monitor, before = self._monitor, self._llm.mask
        if choice.mask == before:
            return False
        used, started = monitor.used_bytes, time.perf_counter()
        self._llm.apply(choice.mask)
        monitor.trim()
        seconds = time.perf_counter() - started
        self.count += 1
        self.seconds += seconds
        decision = Decision(
            time_s=self._clock(),
            wall_time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            why=why,
            before=before,
            after=choice.mask,
            bytes_before=used,
            bytes_after=monitor.used_bytes,
            budget_bytes=monitor.budget_bytes,
            shape=shape,
            decision_s=choice.decision_s,
            switch_s=seconds,
            guarded=choice.guarded,
        )
        self.recent.append(decision)
        if self._log is not None:
            self._log.append(decision)
        return True


_TRIES = 4  # of making a mask fit by measured bytes


class MaskController:
    """Chooses masks and applies them, until what is measured fits.

    Args:
        llm: The live model.
        mask_chooser: Chooses masks that fit by arithmetic.
        estimator: The arithmetic.
        monitor: Measures.
        switcher: Applies masks.
        hysteresis_share: As for `RuntimeController`, and so are the next two.
        hold_s: Seconds for which there must have been room before blocks come back.
        clock: Gives the time in seconds.

    Attributes:
        decisions: How often the policy was asked.
        decision_s: Seconds spent choosing.
        next_pass: Tokens that the next pass runs, and tokens that caches hold more afterwards.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        mask_chooser: MaskChooser,
        estimator: MemoryEstimator,
        monitor: MemoryMonitor,
        switcher: MaskSwitcher,
        *,
        hysteresis_share: float,
        hold_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._mask_chooser = mask_chooser
        self._estimator = estimator
        self._monitor = monitor
        self._switcher = switcher
        self._hysteresis_share = hysteresis_share
        self._clock = clock
        self._room = Debounce(hold_s)
        self._enough: tuple[BatchShape, int] | None = (
            None  # too little spare to ask the policy again
        )
        self._switched_for = EMPTY_BATCH
        self._refills = False
        self.decisions = 0
        self.decision_s = 0.0
        self.next_pass = (0, 0)

    def coming(self, shape: BatchShape) -> PassEstimate:
        """What the next pass asks for; where attention came back, its keys and values too."""
        mask = self._llm.mask
        coming = self._estimator.coming(mask, shape, *self.next_pass)
        if not self._refills:
            return coming
        final = self._estimator.peak_bytes(mask, shape) - self._estimator.workspace_bytes(shape)
        growth = max(coming.growth, final - self._monitor.held.total)
        return PassEstimate(coming.workspace + self._estimator.refill_bytes(mask, shape), growth)

    def decoded(self) -> None:
        """A pass of all rows has ended, and with it any refill."""
        self._refills = False

    def fit(self, shape: BatchShape, room_bytes: int, why: Why, *, running: bool) -> bool:
        """Apply a mask that needs no more than there is room for.

        Args:
            shape: What is to be served.
            room_bytes: The room.
            why: What gave rise to it.
            running: Whether there are tokens already, which a refill would run again.

        Returns:
            Whether a mask fits.
        """
        self._room.close()
        choice = self._choose(shape, room_bytes)
        if choice is not None and running:
            choice = self._mask_chooser.without_refill(choice, self._llm.mask, shape, room_bytes)
        return choice is not None and self._settle(choice, shape, why, running=running)

    def empty(self) -> None:
        """Remove all that the guard may remove: nobody runs who could be sent away."""
        least = self._mask_chooser.least(self._monitor.budget_bytes)
        need = self._estimator.peak_bytes(least, EMPTY_BATCH)
        self._switch(
            MaskChoice(least, need, guarded=True), EMPTY_BATCH, "budget_fell", running=False
        )

    def suit(self, need_bytes: int, shape: BatchShape) -> None:
        """Apply the policy's mask for a shape if it needs more than that of now, and fits."""
        monitor = self._monitor
        spared = int(monitor.budget_bytes * self._hysteresis_share)
        choice = self._choose(shape, monitor.budget_bytes - spared - monitor.margin.bytes)
        if choice is not None and choice.need_bytes > need_bytes:
            self._settle(choice, shape, "arrival", running=False)

    def restore(self, need_bytes: int, shape: BatchShape) -> None:
        """Bring blocks back once there has been room for them long enough.

        Args:
            need_bytes: What the mask of now needs.
            shape: What runs.
        """
        monitor = self._monitor
        spared = int(monitor.budget_bytes * self._hysteresis_share)
        spare = monitor.budget_bytes - spared - monitor.margin.bytes - need_bytes
        freed = self._estimator.freed_bytes(shape)
        least = max(1, min(freed[index] for index in self._llm.mask.indices))
        held = self._room.held(self._clock(), spare, least)
        if held is None or (self._enough and self._enough[0] == shape and held < self._enough[1]):
            return
        monitor.trim()
        exact = monitor.exact_room_bytes(shape, self.coming(shape)) - spared
        choice = self._choose(shape, min(need_bytes + held, exact))
        if choice is not None and shape and self._returns_attention(choice):
            refilled = exact - self._estimator.refill_bytes(choice.mask, shape)
            if choice.need_bytes > refilled:
                choice = self._choose(shape, refilled)
        if choice is not None and choice.need_bytes > need_bytes:
            left = shape.tokens < self._switched_for.tokens
            self._settle(choice, shape, "left" if left else "room", running=bool(shape))
        else:  # ask again when there is room for a block more
            self._enough = (shape, held + least)

    def _choose(self, shape: BatchShape, limit_bytes: int) -> MaskChoice | None:
        started = time.perf_counter()
        choice, asked = self._mask_chooser.choose(shape, limit_bytes)
        seconds = time.perf_counter() - started
        self.decisions += asked
        self.decision_s += seconds
        return None if choice is None else replace(choice, decision_s=seconds)

    def _settle(self, choice: MaskChoice, shape: BatchShape, why: Why, *, running: bool) -> bool:
        """Apply a mask; if it does not fit by what is measured then, try with less."""
        chosen: MaskChoice | None = choice
        for _ in range(_TRIES):
            if chosen is None:
                return False
            self._switch(chosen, shape, why, running=running)
            room = self._monitor.exact_room_bytes(shape, self.coming(shape))
            if chosen.need_bytes <= room:
                return True
            chosen = self._choose(shape, room)
        return False

    def _returns_attention(self, choice: MaskChoice) -> bool:
        return (self._llm.mask - choice.mask).count("attn") > 0

    def _switch(self, choice: MaskChoice, shape: BatchShape, why: Why, *, running: bool) -> None:
        refills = self._refills or (running and self._returns_attention(choice))
        if self._switcher.switch(choice, shape, why):
            self._refills = refills
            self._room.close()
            self._switched_for = shape
            self._enough = None

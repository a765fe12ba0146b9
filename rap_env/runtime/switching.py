"""Applies masks to a live model, and keeps the record of it."""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rap_env.runtime.chooser import Choice
from rap_env.runtime.decisions import Decision, DecisionLog, Why
from rap_env.runtime.demand import Demand
from rap_env.runtime.gauge import Gauge

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_RECENT = 256


class Switcher:
    """Switches masks.

    Args:
        llm: The live model.
        gauge: Measures before and after.
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
        gauge: Gauge,
        log: DecisionLog | None,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._gauge = gauge
        self._log = log
        self._clock = clock
        self.count = 0
        self.seconds = 0.0
        self.recent: deque[Decision] = deque(maxlen=_RECENT)

    def switch(self, choice: Choice, demand: Demand, why: Why) -> bool:
        """Apply a mask, give what was freed back to the system, and measure.

        Args:
            choice: The mask.
            demand: What it is for.
            why: What gave rise to it.

        Returns:
            Whether it is another mask than before.

        Raises:
            RapError: The model cannot do it; see `ElasticLLM.apply`.
        """
        gauge, before = self._gauge, self._llm.mask
        if choice.mask == before:
            return False
        used, started = gauge.used_bytes, time.perf_counter()
        self._llm.apply(choice.mask)
        gauge.trim()
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
            bytes_after=gauge.used_bytes,
            budget_bytes=gauge.budget_bytes,
            demand=demand,
            decision_s=choice.decision_s,
            switch_s=seconds,
            guarded=choice.guarded,
        )
        self.recent.append(decision)
        if self._log is not None:
            self._log.append(decision)
        return True

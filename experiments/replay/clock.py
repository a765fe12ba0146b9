"""A clock for a replay: it runs while the engine works, and jumps over idle time."""

from __future__ import annotations

import time
from collections.abc import Callable

STOPWATCHES: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What measures the engine's work, by the name of `ReplayConfig.timing`."""


class ReplayClock:
    """Seconds since the start of a replay: real seconds of work, and the idle ones jumped over.

    Between two calls of `resume` and `stop` it stands still, so that what only the replay does
    (records, submitting requests) takes no time.

    Args:
        stopwatch: Gives seconds of real work.
    """

    def __init__(self, stopwatch: Callable[[], float] = time.perf_counter) -> None:
        self._stopwatch = stopwatch
        self._passed_s = 0.0
        self._since_s: float | None = None

    def __call__(self) -> float:
        """Seconds since the start."""
        running = 0.0 if self._since_s is None else self._stopwatch() - self._since_s
        return self._passed_s + running

    def resume(self) -> None:
        """Let it run; work begins."""
        if self._since_s is None:
            self._since_s = self._stopwatch()

    def stop(self) -> None:
        """Let it stand still; work has ended."""
        self._passed_s = self()
        self._since_s = None

    def jump_to(self, time_s: float) -> None:
        """Skip idle time; never goes back."""
        self._passed_s += max(0.0, time_s - self())

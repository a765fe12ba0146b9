"""The queue of requests that wait to be admitted by the scheduler."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rap_env.errors import EngineClosedError, QueueFullError

if TYPE_CHECKING:
    from rap_env.runtime.sequence import TokenSequence


class RequestQueue:
    """At most `max_size` requests that wait, first come, first served; thread-safe.

    Preempted requests may always return.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._waiting: deque[TokenSequence] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[TokenSequence, ...]:
        """The requests that wait, in order."""
        with self._lock:
            return tuple(self._waiting)

    def append(self, sequence: TokenSequence) -> None:
        """Add a request at the end; raises `QueueFullError` or `EngineClosedError`."""
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed and accepts no more requests.")
            if len(self._waiting) >= self._max_size:
                raise QueueFullError(
                    f"The queue is full: {len(self._waiting)} requests wait, and at most "
                    f"{self._max_size} may. Try again later."
                )
            self._waiting.append(sequence)

    def put_first(self, sequence: TokenSequence) -> None:
        """Add a preempted request at the front."""
        with self._lock:
            self._waiting.appendleft(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Remove a request."""
        with self._lock:
            self._waiting.remove(sequence)

    def remove_if(self, predicate: Callable[[TokenSequence], bool]) -> list[TokenSequence]:
        """Remove and return all requests that match a predicate."""
        if not self._waiting:
            return []
        with self._lock:
            removed = [sequence for sequence in self._waiting if predicate(sequence)]
            if removed:
                self._waiting = deque(kept for kept in self._waiting if kept not in removed)
        return removed

    def close(self) -> list[TokenSequence]:
        """Accept no more requests, and remove and return those that wait."""
        with self._lock:
            self._closed = True
            removed, self._waiting = list(self._waiting), deque()
        return removed

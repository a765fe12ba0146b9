"""The line in which requests wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from rap_env.errors import EngineClosedError, QueueFullError
from rap_env.runtime.jobs import Job


class WaitingLine:
    """First come, first served; thread-safe.

    Args:
        longest: How many may wait. Those that were sent back to the front always may.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def append(self, job: Job) -> None:
        """Queue up.

        Raises:
            QueueFullError: Too many wait.
            EngineClosedError: The line is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed and takes no more requests.")
            if len(self._jobs) >= self._longest:
                raise QueueFullError(
                    f"{len(self._jobs)} requests wait already, the most that may; try again later."
                )
            self._jobs.append(job)

    def put_first(self, job: Job) -> None:
        """Queue up at the front."""
        with self._lock:
            self._jobs.appendleft(job)

    def first(self) -> Job | None:
        """Who is next, left in line."""
        with self._lock:
            return self._jobs[0] if self._jobs else None

    def leave(self, job: Job) -> None:
        """Take somebody out of the line."""
        with self._lock:
            self._jobs.remove(job)

    def remove_if(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take all out for whom something holds, and return them."""
        if not self._jobs:
            return []
        with self._lock:
            out = [job for job in self._jobs if unwanted(job)]
            if out:
                self._jobs = deque(job for job in self._jobs if job not in out)
        return out

    def close(self) -> list[Job]:
        """Let nobody in any more, and return those who wait."""
        with self._lock:
            self._closed = True
            out, self._jobs = list(self._jobs), deque()
        return out

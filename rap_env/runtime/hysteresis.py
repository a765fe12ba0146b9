"""What keeps a mask from flapping: there must have been room for a while."""

from __future__ import annotations


class Room:
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

"""What steps took beyond what was predicted, learned from the meter."""

from __future__ import annotations


class LearnedMargin:
    """Bytes to keep free on top of a prediction: the most that recent steps took beyond theirs.

    The arithmetic knows weights and KV cache exactly and estimates the workspace. It does not
    know what libraries keep, nor how a heap is cut up. All of that lasts, so what was seen is
    expected again. But it is forgotten after `window` to twice as many steps of the same kind that
    did not show it again: a single burst of somebody else's in the same process would otherwise
    cost blocks for good. Each kind of step forgets for itself: a thousand quiet decoding steps
    say nothing about the next prompt.

    Args:
        least_bytes: Never less than this.
        window: Steps of a kind after which a new maximum is begun.
    """

    def __init__(self, least_bytes: int = 0, window: int = 512) -> None:
        self.least_bytes = least_bytes
        self._window = window
        self._kinds: dict[str, list[int]] = {}  # steps in this window, its maximum, the last one's
        self.bytes = max(0, least_bytes)

    def note(self, kind: str, beyond_bytes: int) -> None:
        """Take in how far a step went beyond its prediction.

        Args:
            kind: What the step did (``"prefill"``, ``"decode"``, ...).
            beyond_bytes: Bytes above the prediction; negative if it was not reached.
        """
        seen = self._kinds.setdefault(kind, [0, 0, 0])
        seen[0] += 1
        if beyond_bytes > seen[1]:
            seen[1] = beyond_bytes
        elif seen[0] < self._window:
            return
        if seen[0] >= self._window:
            self._kinds[kind] = [0, max(0, beyond_bytes), seen[1]]
        self.bytes = max(self.least_bytes, *(max(k[1], k[2]) for k in self._kinds.values()))

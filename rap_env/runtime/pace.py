"""How the engine shares its time between prompts and tokens."""

from __future__ import annotations

import math

_NEW_SHARE = 0.1  # of the last step in the average time of a step
_LEAST_SHARE = 1.0
"""Time that a decode step gives to prompts, as a share of its own, if the target leaves less: half
of all time. Otherwise requests would wait without end on a machine that misses the target."""


class Pace:
    """Decode steps between two prompt chunks, so that tokens keep coming at a target rate.

    A chunk takes as long as many decode steps. With a target of t seconds between tokens, steps of
    d and a chunk of c, ``c / (t - d)`` steps follow the chunk before the next one. The longest time
    between two tokens is that of a chunk in any case; smaller chunks shorten it.

    Args:
        target_itl_s: Mean seconds between the tokens of an answer while prompts are read; None for
            one step between two chunks.

    Attributes:
        decode_s: Seconds of a decode step, as a moving average; 0 before the first one.
    """

    def __init__(self, target_itl_s: float | None) -> None:
        self._target_s = target_itl_s
        self._steps = 0
        self.decode_s = 0.0

    @property
    def decodes_first(self) -> bool:
        """Whether decode steps are due before the next chunk."""
        return self._steps > 0

    def note_chunk(self, seconds: float, waiting: int = 0) -> None:
        """A prompt chunk has taken so long; one of the steps follows it in the same turn.

        Args:
            seconds: What it took.
            waiting: Requests that have not begun: the target is 1 + `waiting` times as long.
        """
        if self._target_s is not None and self.decode_s:
            spare_s = self._target_s * (1 + waiting) - self.decode_s
            self._steps = math.ceil(seconds / max(spare_s, _LEAST_SHARE * self.decode_s))

    def note_step(self, seconds: float) -> None:
        """A decode step has taken so long."""
        self._steps = max(0, self._steps - 1)
        self.decode_s += _NEW_SHARE * (seconds - self.decode_s) if self.decode_s else seconds

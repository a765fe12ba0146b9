"""The longest prompt that fits a memory budget alone."""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import TYPE_CHECKING

from rap_env.runtime.batch_shape import BatchShape

if TYPE_CHECKING:
    from rap_env.runtime.controller import RuntimeController


class LongestPrompt:
    """Finds the longest prompt that fits the largest expected budget alone. Threads may share it.

    Within the quality floor, it is the longest for which a plan above the floor is found. The
    safety margin is left out, since it changes: an engine may still reject a shorter prompt.

    Args:
        controller: Knows the budget and chooses plans.
        most_tokens: Tokens of the longest prompt that the engine accepts.
    """

    def __init__(self, controller: RuntimeController, most_tokens: int) -> None:
        self._controller = controller
        self._most_tokens = most_tokens
        self._lock = threading.Lock()
        self._found: tuple[int, int] | None = None  # a budget, and what fits it

    def tokens(self) -> int:
        """Most tokens of a prompt with an answer of one token; 0 if none fits.

        A new budget takes a search, up to a second.
        """
        budget = self._controller.monitor.budget_limit_bytes()
        with self._lock:
            if self._found is None or self._found[0] != budget:
                self._found = (budget, self._search(budget))
            return self._found[1]

    def _search(self, budget_bytes: int) -> int:
        could_fit = self._controller.chooser.could_fit
        lengths = range(1, self._most_tokens + 1)
        # The last generated token is not fed back, so the cache holds the prompt alone.
        return bisect_left(
            lengths, True, key=lambda tokens: not could_fit(BatchShape(1, tokens), budget_bytes)
        )

"""Items whose weights cannot be read now: plans go without them until they can."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rap_env.errors import RapError
from rap_env.plan import Plan

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_MOST_READING_S = 0.2
"""Seconds after which reading goes on at the next call only, because requests wait for it."""


class UnreadableWeights:
    """Items whose weights could not be read when a plan needed them: plans go without them.

    A warning is logged when weights are missing, and a line when all are back; not for each item
    or attempt. Any thread may read it; only the thread that runs the model changes it.

    Args:
        llm: The live model.
        clock: Gives the time in seconds.

    Attributes:
        items: Their names, those that are tried first at the beginning.
        reason: Why the first one could not be read; empty while all can be read.
    """

    def __init__(self, llm: ElasticLLM, clock: Callable[[], float]) -> None:
        self._llm = llm
        self._clock = clock
        self._retry_at_s = 0.0
        self.items: tuple[str, ...] = ()
        self.reason = ""

    @property
    def clause(self) -> str:
        """Words that qualify "plan" in messages; empty while all weights can be read."""
        return f" without {len(self.items)} items that cannot be read" if self.items else ""

    def add(self, errors: Mapping[str, RapError]) -> None:
        """Note the errors of items, as `ElasticLLM.apply_readable` returns them."""
        if not errors:
            return
        if not self.items:
            self.reason = str(next(iter(errors.values())))
            log.warning(
                "The weights of %d items cannot be read; plans go without them until they can, and "
                "a try follows every %g s: %s", len(errors), _RETRY_S, self.reason,
            )  # fmt: skip
            self._retry_at_s = self._clock() + _RETRY_S
        self.items = (*self.items, *(item for item in errors if item not in self.items))

    def without(self, plan: Plan) -> Plan:
        """A plan in which each of the items has the level that it has now, or is removed."""
        present = self._llm.plan.levels
        return plan.lower({item: present.get(item, "native") for item in self.items})

    def retry(self) -> bool:
        """Try to read items again, if it is time to; return whether one can be read.

        Plans may then use it. Other items are read at once, as long as that takes little time, and
        then at the next call. After a failure, the next item is tried `_RETRY_S` later.
        """
        if not self.items or self._clock() < self._retry_at_s:
            return False
        started, before = time.perf_counter(), len(self.items)
        while self.items and time.perf_counter() - started < _MOST_READING_S:
            first, *others = self.items
            try:
                self._llm.verify_weights(first)
            except RapError as error:
                log.debug("Still: %s", error)
                self.items = (*others, first)
                self._retry_at_s = self._clock() + _RETRY_S
                break
            self.items = tuple(others)
        if not self.items:
            self.reason = ""
            log.info("All weights can be read again.")
        return len(self.items) < before

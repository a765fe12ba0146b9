"""What is used, what may be used, and what is kept free for what nobody foresees."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rap_env.errors import MemorySourceError
from rap_env.llm.device import return_freed_memory
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.memory_estimator import MemoryEstimator, PassEstimate
from rap_env.runtime.memory_meter import Meter
from rap_env.runtime.memory_source import MemorySource

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM


class SafetyMargin:
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


log = logging.getLogger(__name__)


class MemoryMonitor:
    """Reads the meter and the memory source, and learns from them.

    On a CPU freed memory stays with the process until it is given back (`trim`), and is used again
    by what comes next. So what is measured is held against the most that tensors and workspace
    took since then; only what goes beyond that is new and belongs in the margin.

    Args:
        llm: The live model.
        memory: Says the budget.
        meter: Measures what is used.
        estimator: Counts what is foreseen.
        margin: What to keep free.

    Attributes:
        memory: As given.
        meter: As given.
        margin: As given.
        used_bytes: What was measured last.
        budget_bytes: The budget when last asked.
        most_bytes: The largest budget so far.
        held: Bytes of the tensors that were held when last counted.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        memory: MemorySource,
        meter: Meter,
        estimator: MemoryEstimator,
        margin: SafetyMargin,
    ) -> None:
        self._llm = llm
        self._estimator = estimator
        self.memory = memory
        self.meter = meter
        self._correct = getattr(meter, "no_less_than", None)  # not every meter can be wrong so
        self.margin = margin
        self.held = llm.held_bytes
        self._explained = self.held.total
        self.used_bytes = meter.used_bytes()
        self.budget_bytes = self.most_bytes = memory.budget_bytes(self.used_bytes)

    def poll(self) -> None:
        """Measure, and ask for the budget; if that fails, it stays as it was."""
        self.used_bytes = self.meter.used_bytes()
        self.budget_bytes = self._asked()

    def limit_bytes(self) -> int:
        """The largest budget so far, or the most that the source says it may become.

        From any thread; `budget_bytes` stays that of the thread that polls.
        """
        self._asked()
        return max(self.most_bytes, getattr(self.memory, "limit_bytes", None) or 0)

    def _asked(self) -> int:
        try:
            budget = self.memory.budget_bytes(self.used_bytes)
        except MemorySourceError as error:
            log.warning("The budget stays at %d bytes: %s", self.budget_bytes, error)
            return self.budget_bytes
        self.most_bytes = max(self.most_bytes, budget)
        return budget

    def observe(self, shape: BatchShape, kind: str) -> int:
        """Learn from the step that has just ended; see `RuntimeController.observe`."""
        peak = self.meter.peak_bytes()
        self.held = self._llm.held_bytes
        if peak < self.held.total and self._correct is not None:
            self._correct(self.held.total)
            peak = self.held.total
        known = self.held.total + self._estimator.workspace_bytes(shape)
        self._explained = max(self._explained, known)
        self.margin.note(kind, peak - self._explained)
        return peak

    def rest(self) -> None:
        """Nothing runs: give freed memory back, and forget in time what steps went beyond."""
        if self._explained > self.held.total:
            self.trim()
        self.margin.note("decode", self.used_bytes - self._explained)

    def trim(self) -> None:
        """Give freed memory back to the system, and measure again.

        The meter's peak begins anew: what was held before belongs to the steps before.
        """
        return_freed_memory()
        self.meter.peak_bytes()
        self.used_bytes = self.meter.used_bytes()
        self.held = self._llm.held_bytes
        self._explained = self.held.total

    def room_bytes(self, shape: BatchShape, coming: PassEstimate) -> int:
        """What masks may need for a shape, so that the coming pass stays within the budget.

        That is the budget without the margin, as long as what is used now, with all that the pass
        may ask for on top, fits. If not, freed memory goes back first; if it still does not,
        what the process holds beside its tensors is more than the margin, and counts instead.

        Args:
            shape: What is to be served.
            coming: What the pass asks for.
        """
        if self.used_bytes + coming.total > self.budget_bytes:
            self.trim()
            if self.used_bytes + coming.total > self.budget_bytes:
                return self.exact_room_bytes(shape, coming)
        return self.budget_bytes - self.margin.bytes

    def exact_room_bytes(self, shape: BatchShape, coming: PassEstimate) -> int:
        """The same right after a trim, with what the process holds beside its tensors counted."""
        beside = self.used_bytes - self.held.total
        beyond = beside + coming.workspace - self._estimator.workspace_bytes(shape)
        return self.budget_bytes - max(self.margin.bytes, beyond)

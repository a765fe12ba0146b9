"""What is used, what may be used, and what is kept free for what nobody foresees."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rap_env.errors import MemorySourceError
from rap_env.llm.device import return_freed_memory
from rap_env.runtime.demand import Demand
from rap_env.runtime.margin import LearnedMargin
from rap_env.runtime.memory import MemorySource
from rap_env.runtime.meter import Meter
from rap_env.runtime.needs import Coming, Needs

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

log = logging.getLogger(__name__)


class Gauge:
    """Reads the meter and the memory source, and learns from them.

    On a CPU freed memory stays with the process until it is given back (`trim`), and is used again
    by what comes next. So what is measured is held against the most that tensors and workspace
    took since then; only what goes beyond that is new and belongs in the margin.

    Args:
        llm: The live model.
        memory: Says the budget.
        meter: Measures what is used.
        needs: Counts what is foreseen.
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
        needs: Needs,
        margin: LearnedMargin,
    ) -> None:
        self._llm = llm
        self._needs = needs
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

    def observe(self, demand: Demand, kind: str) -> int:
        """Learn from the step that has just ended; see `RuntimeController.observe`."""
        peak = self.meter.peak_bytes()
        self.held = self._llm.held_bytes
        if peak < self.held.total and self._correct is not None:
            self._correct(self.held.total)
            peak = self.held.total
        known = self.held.total + self._needs.workspace_bytes(demand)
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

    def room_bytes(self, demand: Demand, coming: Coming) -> int:
        """What masks may need for a demand, so that the coming pass stays within the budget.

        That is the budget without the margin, as long as what is used now, with all that the pass
        may ask for on top, fits. If not, freed memory goes back first; if it still does not,
        what the process holds beside its tensors is more than the margin, and counts instead.

        Args:
            demand: What is to be served.
            coming: What the pass asks for.
        """
        if self.used_bytes + coming.total > self.budget_bytes:
            self.trim()
            if self.used_bytes + coming.total > self.budget_bytes:
                return self.exact_room_bytes(demand, coming)
        return self.budget_bytes - self.margin.bytes

    def exact_room_bytes(self, demand: Demand, coming: Coming) -> int:
        """The same right after a trim, with what the process holds beside its tensors counted."""
        beside = self.used_bytes - self.held.total
        beyond = beside + coming.workspace - self._needs.workspace_bytes(demand)
        return self.budget_bytes - max(self.margin.bytes, beyond)

"""The memory budget, and measured bytes against it, with a margin for what predictions miss.

A budget is the bytes for weights, KV cache and workspace together.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from rap_env.errors import MemorySourceError
from rap_env.models.device import return_freed_memory
from rap_env.runtime.memory_estimator import (
    UNKNOWN_PASS,
    BatchShape,
    MemoryEstimator,
    PassSize,
)
from rap_env.runtime.memory_meter import Meter, ResidentMeter

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

HEADROOM_BYTES = 8 * 2**20
"""Bytes below a process's limit that stay free: for request bodies, texts and responses."""

_MOST_FREED_BYTES = 4 * 2**20
"""Freed bytes that a step may leave with the process before they are returned to the
system."""
_EXCESS_LASTS_S = 40.0

_LEAST_CHANGE_BYTES = 2**20
"""Change of what the process holds besides the model that is measured while nothing runs."""


class MemorySource(ABC):
    """Gives the budget: how much memory the runtime may use. Only `budget_bytes` is needed.

    Attributes:
        name: For logs and metrics.
        is_given: Whether someone sets the budget, so that it holds as soon as it is read.
        reserve_bytes: Bytes that the budget leaves free of what the system reports.
    """

    name: str
    is_given: ClassVar[bool] = False
    reserve_bytes: int = 0

    @abstractmethod
    def budget_bytes(self, used_bytes: int) -> int:
        """Bytes that the runtime may use now.

        Args:
            used_bytes: Bytes that it uses already.

        Raises:
            MemorySourceError: The budget cannot be read.
        """

    @property
    def limit_bytes(self) -> int | None:
        """The largest budget that it will ever give, if that is known."""
        return None

    @property
    def process_bytes(self) -> int | None:
        """Most resident bytes of the whole process now; None if only the model is limited."""
        return None

    @property
    def other_bytes(self) -> int | None:
        """Bytes that count against `process_bytes` besides the model, as last measured."""
        return None


class GivenMemory(MemorySource):
    """A budget set from outside: of the model, or of the whole process.

    Of a process, the model may use what is left beside everything else that is resident
    (interpreter, libraries, tokenizer, server, freed memory that the C library keeps), which
    is the meter's baseline (`Meter.measure_others`).

    Args:
        budget: The budget in bytes, or a function that returns it whenever it is called.
        limit_bytes: The largest budget that the function will ever return, if known. A
            request that does not fit it is rejected on arrival; one that does waits.
        meter: Measures the process, if the budget is that of the process.
    """

    name = "given"
    is_given = True

    def __init__(
        self,
        budget: Callable[[], float] | int,
        *,
        limit_bytes: int | None = None,
        meter: ResidentMeter | None = None,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._meter = meter
        if callable(budget):
            self._read = budget
        else:
            fixed = budget
            self._read = lambda: fixed
            self._limit_bytes = fixed if limit_bytes is None and meter is None else limit_bytes

    @property
    def limit_bytes(self) -> int | None:
        """The given limit, or the given number of bytes."""
        return self._limit_bytes

    @property
    def process_bytes(self) -> int | None:
        """The given budget, if it is that of the process."""
        return None if self._meter is None else int(self._read())

    @property
    def other_bytes(self) -> int | None:
        """Resident bytes of all that is not the model, if the budget is that of the process."""
        return None if self._meter is None else self._meter.baseline_bytes

    def budget_bytes(self, used_bytes: int) -> int:
        """The given budget; of a process, less `other_bytes` and the headroom.

        Raises:
            MemorySourceError: The function did not return a finite number.
        """
        budget = self._read()
        if not math.isfinite(budget):
            raise MemorySourceError(
                f"The budget function returned {budget!r}; it should return a number of bytes."
            )
        others = self.other_bytes
        return max(0, int(budget) - (0 if others is None else others + HEADROOM_BYTES))


class SafetyMargin:
    """Bytes reserved on top of a prediction: the largest recent excess of a step.

    Weights and KV cache are predicted exactly, the workspace is estimated. Allocations inside
    libraries and heap fragmentation are unknown. They persist, so a measured excess is
    expected again. It expires after some time in which it was not reached: otherwise one
    burst of unrelated allocations in the process would cost blocks forever. Each kind of step
    is learned separately, since decode steps tell nothing about the next prefill.

    Args:
        clock: Gives the time in seconds.

    Attributes:
        bytes: The margin.
        decode_bytes: The margin while no prompt is prefilled.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By kind the times of excesses that no later one reached, the largest first.
        self._kinds: dict[str, deque[tuple[float, int]]] = {}
        self.bytes = self.decode_bytes = 0

    def observe(self, kind: str, excess_bytes: int) -> None:
        """Learn from a step.

        Args:
            kind: What the step did (``"prefill"``, ``"decode"``, ...).
            excess_bytes: Measured bytes above the prediction; negative if below.
        """
        recent, excess = self._kinds.setdefault(kind, deque()), max(0, excess_bytes)
        while recent and recent[-1][1] <= excess:
            recent.pop()
        recent.append((self._clock(), excess))
        self.expire()

    def expire(self) -> None:
        """Forget what is too long ago."""
        oldest_s = self._clock() - _EXCESS_LASTS_S
        most = {"prefill": 0, "decode": 0}
        for kind, recent in self._kinds.items():
            while recent and recent[0][0] < oldest_s:
                recent.popleft()
            most[kind] = recent[0][1] if recent else 0
        prefill_bytes = most.pop("prefill")
        self.decode_bytes = max(most.values())
        self.bytes = max(self.decode_bytes, prefill_bytes)

    def forget(self) -> None:
        """Forget all steps so far."""
        self._kinds.clear()
        self.bytes = self.decode_bytes = 0

    def bytes_for(self, *, prefills: bool) -> int:
        """The margin for passes with or without prefills."""
        return self.bytes if prefills else self.decode_bytes


class MemoryMonitor:
    """Reads the meter and the memory source, and learns the safety margin from them.

    On a CPU, freed memory stays with the process until it is returned to the system (`trim`),
    and later allocations reuse it. So measured bytes are compared with the most that tensors
    and workspace took since the last trim; only the excess over that goes into the margin.
    What the process holds besides the model is measured again at each trim, whatever is
    limited, so that none of it is charged to the model for long.

    Attributes:
        used_bytes: Bytes as last measured.
        budget_bytes: The budget as last read.
        max_budget_bytes: The largest budget so far.
        borrowed_bytes: Bytes of the source's reserve that the budget has now; see `borrow`.
        held: Bytes of the tensors held, as last counted.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        source: MemorySource,
        meter: Meter,
        estimator: MemoryEstimator,
        margin: SafetyMargin,
    ) -> None:
        self._llm = llm
        self.source = source
        self.meter = meter
        self._estimator = estimator
        self.margin = margin
        self.held = llm.held_bytes
        self._explained_bytes = self.held.total
        self.used_bytes = meter.used_bytes()
        self._other_bytes = self.used_bytes - self.held.total  # since the last trim
        self.borrowed_bytes = 0
        self.budget_bytes = self.max_budget_bytes = source.budget_bytes(self.used_bytes)

    def poll(self) -> None:
        """Measure, and read the budget; if that fails, the last budget stays."""
        self.margin.expire()
        self.used_bytes = self.meter.used_bytes()
        self.budget_bytes = self._read_budget()

    def excess_bytes(self) -> int:
        """Bytes in use above the budget, if that has fallen since the last `poll`, else 0."""
        try:
            budget = self.source.budget_bytes(self.used_bytes)
        except MemorySourceError:
            return 0
        budget += self.borrowed_bytes
        return max(0, self.meter.used_bytes() - budget) if budget < self.budget_bytes else 0

    @property
    def usable_reserve_bytes(self) -> int:
        """Bytes of the source's reserve that may be borrowed: all but the headroom of a process."""
        return max(0, self.source.reserve_bytes - HEADROOM_BYTES)

    def borrow(self, reserve_bytes: int) -> None:
        """Let the budget have so many bytes of the source's reserve from now on."""
        self.budget_bytes += reserve_bytes - self.borrowed_bytes
        self.borrowed_bytes = reserve_bytes

    def budget_now_bytes(self) -> int:
        """A given budget as it is now, any other as last read; any thread may call it."""
        return self._read_budget() if self.source.is_given else self.budget_bytes

    def budget_limit_bytes(self) -> int:
        """The largest budget to expect: the largest so far, or the source's own; with its reserve.

        Any thread may call it; `budget_bytes` stays that of the thread that polls.
        """
        self._read_budget()
        return max(self.max_budget_bytes, self.source.limit_bytes or 0) + self.usable_reserve_bytes

    def _read_budget(self) -> int:
        try:
            budget = self.source.budget_bytes(self.used_bytes)
        except MemorySourceError as error:
            log.warning("The budget stays at %.1f MiB: %s", self.budget_bytes / 2**20, error)
            return self.budget_bytes
        self.max_budget_bytes = max(self.max_budget_bytes, budget)
        return budget + self.borrowed_bytes

    def observe_step(self, shape: BatchShape, kind: str) -> int:
        """Learn from the step that has just ended.

        Args:
            shape: The batch that was in memory, padding included.
            kind: What the step did; the margin of each kind is learned separately.

        Returns:
            Peak bytes measured since the last step or switch.
        """
        peak = self.meter.peak_bytes()
        self.held = self._llm.held_bytes
        if peak < self.held.total:
            self.meter.measure_others(self.held.total)  # they have shrunk
            peak = self.held.total
        predicted = self.held.total + self._estimator.workspace_bytes(shape)
        self._explained_bytes = max(self._explained_bytes, predicted)
        self.margin.observe(kind, peak - self._explained_bytes)
        if peak - predicted > max(0, self._other_bytes) + _MOST_FREED_BYTES:
            self.trim()  # or the next pass has its peak on top
        return peak

    def observe_out_of_memory(self, kind: str) -> None:
        """Learn from a pass that ran out of memory: the budget was not there as a whole."""
        self.margin.observe(kind, self.budget_bytes - self.meter.peak_bytes())
        self.trim()

    def observe_idle(self) -> None:
        """Learn while nothing runs: return freed memory, and let the margin expire."""
        freed, changed = self._explained_bytes - self.held.total, self.used_bytes - self.held.total
        if freed > 0 or abs(changed) > _LEAST_CHANGE_BYTES:
            self.trim()
        self.margin.observe("decode", self.used_bytes - self._explained_bytes)

    def trim(self) -> None:
        """Return freed memory to the system, and measure again, what is not the model's included.

        The meter's peak restarts: memory held before belongs to earlier steps. Pages of
        caches that were not written yet are not resident, so the rest of the process may seem
        to have shrunk while there are any.
        """
        return_freed_memory(self._llm.device)
        self.held = self._llm.held_bytes
        if not self.held.kv_cache or self.meter.used_bytes() > self.held.total:
            self.meter.measure_others(self.held.total)
        self.meter.peak_bytes()
        self.used_bytes = self.meter.used_bytes()
        self.budget_bytes = self._read_budget()
        self._explained_bytes = self.held.total
        self._other_bytes = self.used_bytes - self.held.total

    def room_for_kept(self, shape: BatchShape, next_pass: PassSize = UNKNOWN_PASS) -> int:
        """Bytes that may be kept beside a batch with the present plan; may be negative."""
        return self._estimator.room_for_kept(
            self._llm.plan,
            shape,
            next_pass,
            budget_bytes=self.budget_bytes,
            margin_bytes=self.margin.bytes_for(prefills=next_pass.prefills),
            needed_bytes=self.meter.used_bytes() - self._llm.kept_bytes,
        )

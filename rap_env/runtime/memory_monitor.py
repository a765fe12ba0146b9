"""What the model uses of the memory, measured, against a budget, with a margin for the rest.

A budget is the bytes for weights, KV cache and workspace together. Memory that a process holds
besides the model (the interpreter, libraries, the server, freed memory that the C library keeps)
is the baseline and does not count. It is measured when a meter is made and again by
`measure_others`; growth in between counts.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from rap_env.errors import MemorySourceError
from rap_env.models.device import free_memory_early, mark_and_resident, return_freed_memory
from rap_env.models.weights.packing import buffer_bytes
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.base import Policy
from rap_env.runtime.memory_estimator import (
    UNKNOWN_PASS,
    BatchShape,
    MemoryEstimator,
    PassSize,
)

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

_PAGE_BYTES = 4096
_WARM_UP_TOKENS = 256
_SAMPLE_S = 0.005  # between samples; one takes 20 microseconds
_SAMPLED_S = 60.0  # for the longest step, where `rest` is never called

HEADROOM_BYTES = 8 * 2**20
"""Bytes below a process's limit that stay free: for request bodies, texts and responses."""

_MOST_FREED_BYTES = 4 * 2**20
"""Freed bytes that a step may leave with the process before they are returned to the
system."""
_EXCESS_LASTS_S = 40.0

_LEAST_CHANGE_BYTES = 2**20
"""Change of what the process holds besides the model that is measured while nothing runs."""


class Meter(ABC):
    """Measures the runtime's memory."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes in use now."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Most bytes in use since the last call of this method."""

    def measure_others(self, held_bytes: int) -> None:  # noqa: B027  optional
        """Measure the baseline again: all that is in use besides tensors of `held_bytes`.

        No pass may run, and freed memory should have been returned to the system before.
        """

    def rest(self) -> None:  # noqa: B027  optional
        """Note that no step follows soon, until the next call of `used_bytes`."""


class TensorMeter(Meter):
    """Counts the bytes of weights and KV caches: exact, without any other memory.

    The peak is the largest value at any call of its methods.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self._peak = 0

    def used_bytes(self) -> int:
        """Bytes of the tensors held now."""
        tensor_bytes = self._llm.held_bytes.total
        self._peak = max(self._peak, tensor_bytes)
        return tensor_bytes

    def peak_bytes(self) -> int:
        """Most bytes seen since the last call of this method."""
        used = self.used_bytes()
        peak, self._peak = self._peak, used
        return peak


class CudaMeter(Meter):
    """Bytes that PyTorch's allocator has allocated, temporary tensors included."""

    def __init__(self, llm: ElasticLLM) -> None:
        self._device = llm.device
        self._baseline = 0
        warm_up(llm)
        self.measure_others(llm.held_bytes.total)
        self.peak_bytes()

    def used_bytes(self) -> int:
        """Bytes allocated now."""
        return max(0, torch.cuda.memory_allocated(self._device) - self._baseline)

    def peak_bytes(self) -> int:
        """Most bytes allocated since the last call of this method."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return max(0, peak - self._baseline)

    def measure_others(self, held_bytes: int) -> None:
        """Measure what is allocated besides tensors of `held_bytes`."""
        self._baseline = max(0, torch.cuda.memory_allocated(self._device) - held_bytes)


class ResidentMeter(Meter):
    """Resident memory of this process (Linux), as the kernel counts it.

    Freed memory that the C library keeps counts until it is returned to the system
    (`models.device.return_freed_memory`). To keep it little, large tensors get pages of their
    own from now on. The baseline may shrink after the meter was made (kernels reclaim unused
    pages).

    The peak is the kernel's high-water mark if that has risen since the last call, else the
    largest sample: a thread reads the resident memory every 5 ms, from `used_bytes` until
    `rest`. The mark belongs to all readers of the process, so it is not reset.

    Args:
        llm: The live model, with the residency and the mask that the service starts with.
        process: Where the kernel reports on this process.

    Raises:
        MemorySourceError: The kernel does not report it.
    """

    def __init__(self, llm: ElasticLLM, *, process: Path = Path("/proc/self")) -> None:
        try:
            self._status = os.open(process / "status", os.O_RDONLY)
        except OSError as error:
            raise MemorySourceError(
                f"The memory of this process cannot be read: {error}; use TensorMeter."
            ) from error
        # The sampler may still run.
        weakref.finalize(self, os.close, self._status).atexit = False
        # Between the sampler and the thread that runs the model.
        self._lock = threading.Lock()
        self._mark = 0
        self._peak = 0
        free_memory_early()
        warm_up(llm)
        return_freed_memory()
        self.baseline_bytes = 0
        self.measure_others(llm.held_bytes.total)
        self.peak_bytes()
        self._sampler = _PeakSampler(self)

    def used_bytes(self) -> int:
        """Bytes resident now, less the baseline."""
        self._sampler.resume()
        return max(0, self.sample() - self.baseline_bytes)

    def peak_bytes(self) -> int:
        """Most bytes resident since the last call of this method, less the baseline."""
        with self._lock:
            mark, now = self._read()
            peak = mark if mark > self._mark else max(self._peak, now)
            self._mark, self._peak = mark, now
        return max(0, peak - self.baseline_bytes)

    def rest(self) -> None:
        """Stop sampling until the next call of `used_bytes`: no step follows soon."""
        self._sampler.pause()

    def measure_others(self, held_bytes: int) -> None:
        """Measure what is resident besides tensors of `held_bytes`."""
        self.baseline_bytes = max(0, self.sample() - held_bytes - buffer_bytes())

    def sample(self) -> int:
        """Bytes of the whole process that are resident now, which count in the next peak."""
        with self._lock:
            now = self._read()[1]
            self._peak = max(self._peak, now)
        return now

    def _read(self) -> tuple[int, int]:
        """The high-water mark and the resident bytes of the whole process."""
        return mark_and_resident(os.pread(self._status, 8192, 0))


class _PeakSampler:
    """A thread that samples a meter while steps run; it ends with the meter."""

    def __init__(self, meter: ResidentMeter) -> None:
        self._meter = weakref.ref(meter)
        self._sampling = threading.Event()
        self._until_s = 0.0
        weakref.finalize(meter, self._sampling.set)
        threading.Thread(target=self._run, name="rap-memory-peak", daemon=True).start()

    def resume(self) -> None:
        """Sample for some time from now on."""
        self._until_s = time.monotonic() + _SAMPLED_S
        self._sampling.set()

    def pause(self) -> None:
        """Stop until `resume`."""
        self._sampling.clear()

    def _run(self) -> None:
        while True:
            self._sampling.wait()
            meter = self._meter()
            if meter is None:
                return
            meter.sample()
            del meter
            if time.monotonic() > self._until_s:
                self._sampling.clear()
            time.sleep(_SAMPLE_S)


def process_meter(llm: ElasticLLM) -> Meter:
    """The best meter for the model's device: of CUDA, of the process, or of the tensors."""
    if llm.device.type == "cuda":
        return CudaMeter(llm)
    if llm.device.type == "cpu" and sys.platform == "linux":
        return ResidentMeter(llm)
    return TensorMeter(llm)


def make_levels(llm: ElasticLLM, policy: Policy) -> None:
    """Make all levels of weights once, if a policy chooses among them, and keep them in files.

    Levels are made at their first use, which takes more memory than any plan: half as much
    again as the native weights for the default model. A service should have that behind it
    when its budget begins to count.
    """
    if not policy.weight_levels:
        return
    free_memory_early()
    facts = llm.facts
    for level in policy.weight_levels:
        levels = facts.blocks_at(level)
        if level in facts.embedding_levels:
            levels[EMBEDDINGS] = level
        llm.prepare(Plan.of(levels))
    return_freed_memory()


def warm_up(llm: ElasticLLM) -> None:
    """Load the kept weights, and the libraries that a step needs, into memory.

    Files are mapped and code is loaded at first use: measured before that, the baseline would
    be too small, and the model would seem larger later. Products of a few rows and of many
    run in different code, so the prompt has more tokens than packed kernels multiply
    themselves. Layers are alike, so two of them suffice.
    """
    import rap_env.runtime.sampling  # noqa: F401  takes tens of megabytes
    from rap_env.models.live.live_batch import LiveBatch

    with llm.exclusive(), llm.end_layers():
        for weight in llm.model.state_dict().values():
            if weight.device.type == "cpu" and weight.numel():
                weight.detach().reshape(-1)[:: max(1, _PAGE_BYTES // weight.itemsize)].sum()
        batch = LiveBatch(llm)
        batch.prefill([[0] * min(_WARM_UP_TOKENS, llm.adapter.max_positions - 1)])
        batch.extend([0])
        batch.close()


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

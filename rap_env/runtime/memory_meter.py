"""Measured bytes of the runtime: of the process, of a CUDA device, or of its tensors alone.

Memory that a process holds besides the model (the interpreter, libraries, the server, freed
memory that the C library keeps) is the baseline and does not count. It is measured when the
meter is made and again by `measure_others`; growth in between counts.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rap_env.errors import MemorySourceError
from rap_env.models.device import free_memory_early, mark_and_resident, return_freed_memory
from rap_env.models.weights.packing import buffer_bytes
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.base import Policy

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

_PAGE_BYTES = 4096
_WARM_UP_TOKENS = 256
_SAMPLE_S = 0.005  # between samples; one takes 20 microseconds
_SAMPLED_S = 60.0  # for the longest step, where `rest` is never called


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

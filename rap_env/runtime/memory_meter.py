"""How many bytes the runtime takes, measured: by the process, a CUDA device, or tensors alone.

What a process took beside the model when its meter was made (the interpreter, libraries, other
people's tensors) is not the runtime's; whatever comes on top of that is, wherever it comes from.
"""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from rap_env.errors import MemorySourceError
from rap_env.llm.device import return_freed_memory

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_PAGE_BYTES = 4096


class Meter(Protocol):
    """Measures the runtime's memory."""

    def used_bytes(self) -> int:
        """Bytes that it takes now."""

    def peak_bytes(self) -> int:
        """Most bytes that it took since the last call of this."""


class TensorMeter:
    """Counts the weights and KV caches that are held: exact, and blind to all else.

    The most is that of the moments at which somebody asked.

    Args:
        llm: The live model.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self._most = 0

    def used_bytes(self) -> int:
        """Bytes of the tensors that are held now."""
        held = self._llm.held_bytes.total
        self._most = max(self._most, held)
        return held

    def peak_bytes(self) -> int:
        """Most that was seen since the last call of this."""
        held = self.used_bytes()
        peak, self._most = self._most, held
        return peak


class CudaMeter:
    """What PyTorch's allocator has handed out on the model's device, temporary tensors included.

    Args:
        llm: The live model, on a CUDA device.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._device = llm.device
        warm_up(llm)
        self._beside = max(0, torch.cuda.memory_allocated(self._device) - llm.held_bytes.total)
        self.peak_bytes()

    def used_bytes(self) -> int:
        """Bytes handed out now."""
        return max(0, torch.cuda.memory_allocated(self._device) - self._beside)

    def peak_bytes(self) -> int:
        """Most bytes handed out since the last call of this."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return max(0, peak - self._beside)


class ResidentMeter:
    """Resident memory of this process (Linux), as the kernel counts it.

    Freed memory that the C library holds back counts until it is given back
    (`rap_env.llm.device.return_freed_memory`). Where the kernel's high-water mark cannot be reset,
    the most is that of the moments at which somebody asked. The rest of the process may shrink
    after the meter was made (kernels reclaim pages that nobody uses); see `no_less_than`.

    Args:
        llm: The live model, on the CPU.
        process: The process's folder in the process file system.

    Raises:
        MemorySourceError: The kernel does not tell.
    """

    def __init__(self, llm: ElasticLLM, *, process: Path = Path("/proc/self")) -> None:
        try:
            self._status = os.open(process / "status", os.O_RDONLY)
        except OSError as error:
            raise MemorySourceError(
                f"The memory of this process cannot be read: {error}; use TensorMeter."
            ) from error
        weakref.finalize(self, os.close, self._status)
        self._reset = process / "clear_refs"
        self._most = 0
        self._beside = 0
        warm_up(llm)
        return_freed_memory()
        self._beside = max(0, self.used_bytes() - llm.held_bytes.total)
        self.peak_bytes()

    def used_bytes(self) -> int:
        """Bytes that are resident now."""
        return self._read()[1]

    def peak_bytes(self) -> int:
        """Most bytes that were resident since the last call of this."""
        peak, now = self._read()
        try:
            with self._reset.open("wb") as file:
                file.write(b"5")  # proc(5): resets the high-water mark
        except OSError:
            peak = max(self._most, now)
        self._most = now
        return peak

    def no_less_than(self, held_bytes: int) -> None:
        """Learn from what tensors hold for certain that the rest of the process has shrunk.

        Else the runtime would look smaller than it is, and be allowed more than there is.

        Args:
            held_bytes: Bytes of weights and KV caches in memory now.
        """
        self._beside = max(0, min(self._beside, self._resident()[1] - held_bytes))

    def _read(self) -> tuple[int, int]:
        """The high-water mark and what is resident now, less what is beside the model."""
        peak, now = (max(0, resident - self._beside) for resident in self._resident())
        self._most = max(self._most, now)
        return peak, now

    def _resident(self) -> tuple[int, int]:
        """The high-water mark of the whole process, and what is resident now."""
        status = os.pread(self._status, 8192, 0)
        peak, now = (
            int(status[status.index(name) + len(name) :].split(None, 1)[0]) * 1024
            for name in (b"VmHWM:", b"VmRSS:")
        )
        return peak, now


class ProcessMeter:
    """The best meter for where the model is: `CudaMeter`, `ResidentMeter`, or `TensorMeter`.

    Args:
        llm: The live model; its residency and its mask should be as the service begins.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self.inner: Meter
        if llm.device.type == "cuda":
            self.inner = CudaMeter(llm)
        elif llm.device.type == "cpu" and sys.platform == "linux":
            self.inner = ResidentMeter(llm)
        else:
            self.inner = TensorMeter(llm)

    def used_bytes(self) -> int:
        """Bytes that the runtime takes now."""
        return self.inner.used_bytes()

    def peak_bytes(self) -> int:
        """Most bytes that it took since the last call of this."""
        return self.inner.peak_bytes()

    def no_less_than(self, held_bytes: int) -> None:
        """As for `ResidentMeter`; other meters cannot be wrong in this way."""
        if isinstance(self.inner, ResidentMeter):
            self.inner.no_less_than(held_bytes)


def warm_up(llm: ElasticLLM, tokens: int = 8) -> None:
    """Have the kept weights, and the libraries that a step needs, in memory once.

    Files are mapped, and code is loaded, when they are first used: measured before that, the rest
    of the process would look smaller than it is, and the model larger later on.

    Args:
        llm: The live model.
        tokens: Length of the sequence to run.
    """
    import rap_env.runtime.sampling  # noqa: F401  tens of megabytes, were it imported later
    from rap_env.llm.live_batch import LiveBatch

    with llm.exclusive():
        for weight in llm.model.state_dict().values():
            if weight.device.type == "cpu" and weight.numel():
                weight.detach().reshape(-1)[:: max(1, _PAGE_BYTES // weight.itemsize)].sum()
        batch = LiveBatch(llm)
        batch.prefill([[0] * min(tokens, llm.adapter.max_positions - 1)])
        batch.extend([0])
        batch.close()

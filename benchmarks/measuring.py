"""Shared parts of all benchmarks: settings, alternating measurements, memory peaks."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.record import RESULTS

if TYPE_CHECKING:
    import torch

    from rap_env.models.live.elastic import ElasticLLM


@dataclass
class Settings:
    """Settings of every benchmark; each program adds its own in a subclass."""

    repeats: int = 5
    """Measurements of each side; at least 5 for a published number."""
    threads: int | None = None
    """Threads of torch; null for torch's own number."""
    results_dir: str = str(RESULTS)
    """Folder of the record."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")


@dataclass
class ModelSettings(Settings):
    """Settings of a benchmark that runs a live model."""

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"


def open_model(settings: ModelSettings, weights: str = "bf16") -> ElasticLLM:
    """Set torch's threads and load the model, with unquantised weights unless asked otherwise."""
    from rap_env.models.device import use_threads  # these load torch
    from rap_env.models.files.loading import load_llm

    if settings.threads is not None:
        use_threads(settings.threads)
    return load_llm(settings.model, device=settings.device, dtype=settings.dtype, weights=weights)


def alternate(
    sides: Mapping[str, Callable[[], object]], repeats: int = 5, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn (A B A B ...), so that drift affects all equally.

    Args:
        sides: What to measure, by name. On CUDA the device is synchronised before and after.
        repeats: Measurements of each side.
        warm_up: Calls of each side before the measurement.
    """
    for _ in range(warm_up):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, and their number."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "repeats": len(values),
    }


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Spread of the paired ratios ``slow[i] / fast[i]``: above 1 where `fast` is faster."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of a call, including the work of a CUDA device that is in use."""
    gc.collect()  # so that no side pays for garbage of another one
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - began


def _synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


@dataclass
class Peak:
    """Result of `measured_peak`, complete at the end of its block."""

    peak_bytes: int = 0
    """Most bytes that tensors created in the block held at one time."""


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of all tensor allocations in a ``with`` block, above those before it.

    On CUDA it comes from the allocator's own counters, on a CPU from every event of torch's
    allocator, temporary tensors inside operations included. It does not include pages of
    memory-mapped files, buffers that BLAS libraries allocate themselves, and the release of
    tensors from before the block. On a CPU the block should last seconds, not hours, because each
    operation leaves a profiler event until its end. Blocks cannot be nested.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    measured = Peak()
    if device.type == "cuda":
        factor = torch.ones(64, 64, device=device)
        factor @ factor  # the library takes its workspace, which is of no single measurement
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield measured
        torch.cuda.synchronize(device)
        measured.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        yield measured
    results: Any = seen.profiler
    reports = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    allocated_bytes = 0
    for report in sorted(reports, key=lambda report: report.start_ns()):
        allocated_bytes += report.nbytes()  # negative for freed memory
        measured.peak_bytes = max(measured.peak_bytes, allocated_bytes)

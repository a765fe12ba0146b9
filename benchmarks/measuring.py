"""Shared parts of all benchmarks: settings, alternating measurements, memory peaks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from benchmarks.record import RESULTS
from rap_env.errors import RapError

if TYPE_CHECKING:
    import torch

    from rap_env.models.live.elastic import ElasticLLM

_EXIT_CODE = 2
T = TypeVar("T")


@dataclass
class Settings:
    """Settings of every benchmark; each program adds its own in a subclass."""

    repeats: int = 5
    """Measurements of each side; at least 5 for a published number."""
    threads: int | None = None
    """Threads of torch; null selects the fastest number, measured at the start."""
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

    use_threads(settings.threads or "auto")
    return load_llm(settings.model, device=settings.device, dtype=settings.dtype, weights=weights)


def launch(schema: type[T], run: Callable[[T], object]) -> None:
    """Run a benchmark with the ``key=value`` settings of the command line.

    A misspelt key, a value of the wrong type and a `RapError` of `run` end the program with a
    message and exit code 2; ``--help`` prints the benchmark's text and the default settings.
    """
    words = sys.argv[1:]
    if {"-h", "--help"}.intersection(words):
        defaults = OmegaConf.to_yaml(OmegaConf.structured(schema))
        text = inspect.getdoc(sys.modules[schema.__module__])
        sys.stdout.write(
            f"{text}\n\nSettings, given as key=value, and their defaults:\n\n{defaults}"
        )
        return
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(words))
        settings: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, RapError, ValueError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(schema))  # type: ignore[arg-type]
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        _fail(f"{reason}. Settings are given as key=value; known are {names}.")
    try:
        run(settings)
    except RapError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    sys.stderr.write(f"Error: {message}\n")
    sys.exit(_EXIT_CODE)


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

    from rap_env.models.device import take_library_workspace

    measured = Peak()
    if device.type == "cuda":
        take_library_workspace(device, torch.float32)  # it is of no single measurement
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

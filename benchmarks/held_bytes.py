"""How many bytes of tensors a piece of work really holds at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Peak:
    """Result of `measured_peak`, complete when its block has ended.

    Attributes:
        peak_bytes: Most bytes that tensors made in the block held at one time.
        left_bytes: Bytes that they still held at its end.
    """

    peak_bytes: int = 0
    left_bytes: int = 0


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of all allocations in a ``with`` block, on top of what was there before.

    On CUDA these are the allocator's own counters. On a CPU it is every report of torch's
    allocator, temporary tensors inside of operations included: exact for what goes through it.
    Not seen there are pages of memory-mapped files, buffers that BLAS libraries ask of the
    system themselves, and the release of tensors from before the block. A CPU's block should
    last seconds, not hours: each operation in it leaves a record until the end, and blocks
    cannot be nested.

    Args:
        device: Where the work runs.
    """
    measured = Peak()
    watch = _watched_cuda if device.type == "cuda" else _watched_cpu
    with watch(device, measured):
        yield measured


@contextlib.contextmanager
def _watched_cuda(device: torch.device, measured: Peak) -> Iterator[None]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    torch.cuda.synchronize(device)
    measured.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    measured.left_bytes = torch.cuda.memory_allocated(device) - before


@contextlib.contextmanager
def _watched_cpu(device: torch.device, measured: Peak) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        yield
    results: Any = seen.profiler
    reports = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for report in sorted(reports, key=lambda report: report.start_ns()):
        held += report.nbytes()  # negative where memory was given back
        measured.peak_bytes = max(measured.peak_bytes, held)
    measured.left_bytes = held

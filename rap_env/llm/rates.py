"""What this machine multiplies fastest: measured in half a second, and remembered."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import lru_cache

import torch

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)

Rate = Callable[[torch.dtype, float], float]
"""Products a second in a dtype, measured for so many seconds."""

CLEAR_GAIN = 1.2
"""So many times as fast is worth a change; less may be noise."""
_CANDIDATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SECONDS = 0.5
_SLICES = 5
_KIND, _VERSION = "rap-env.fastest-dtype", 1
# Tokens, width in and width out of one product: a small model's on a CPU; on a GPU one that is
# large enough to show its matrix units.
_CPU_SHAPE, _GPU_SHAPE = (256, 576, 1536), (2048, 2048, 2048)


def products_per_second(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    """How often ``left @ right`` is computed in a second, measured for so many `seconds`."""
    left @ right  # the first product starts threads and picks kernels
    synchronise(left.device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        left @ right
        synchronise(left.device)
        done += 1
    return done / (time.perf_counter() - began)


def measured_dtype(device: torch.device, rate: Rate | None = None) -> torch.dtype:
    """bfloat16 if `device` multiplies in it clearly faster than in float32, else float32.

    It does where it has matrix units for it (AMX, AVX512-BF16, CUDA from Ampere on); elsewhere
    bfloat16 is emulated. The two are measured in turn, half a second in all, and the best of
    several slices counts, so that other work on the machine does not decide. On a CPU one
    thread is measured: threads that wait for each other say nothing about its units.

    Args:
        device: Where the model will run.
        rate: Replaces the measurement.
    """
    rate = rate or _rate_on(device)
    slice_s = _SECONDS / (2 * _SLICES)
    best = dict.fromkeys(_CANDIDATES.values(), 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_SLICES):
            best = {dtype: max(fastest, rate(dtype, slice_s)) for dtype, fastest in best.items()}
    finally:
        torch.set_num_threads(threads)
    gain = best[torch.bfloat16] / best[torch.float32]
    chosen = torch.bfloat16 if gain > CLEAR_GAIN else torch.float32
    log.info("%s multiplies bfloat16 %.2f times as fast as float32: %s it is",
             device, gain, chosen)  # fmt: skip
    return chosen


@lru_cache(maxsize=64)
def remembered_dtype(device: torch.device, processor: str) -> torch.dtype:
    """What `measured_dtype` says, measured once for each kind of processor and version of torch.

    The answer is kept in the cache folder (``dtype-*.json``; delete it to measure anew), so that
    the same machine always answers alike and a later process asks no time for it. A cache that
    cannot be read or written costs half a second in each process, nothing else.

    Args:
        device: Where the model will run.
        processor: The kind of processor, as `rap_env.llm.device.device_kind` names it.
    """
    key = {"processor": processor, "torch": torch.__version__}
    path = cache_dir() / f"dtype-{digest(key)[:16]}.json"
    with contextlib.suppress(OSError, ArtifactError, KeyError):
        return _CANDIDATES[load_artifact(path, _KIND, _VERSION)["dtype"]]
    chosen = measured_dtype(device)
    with contextlib.suppress(OSError):
        save_artifact(path, _KIND, _VERSION, {**key, "dtype": str(chosen).removeprefix("torch.")})
    return chosen


def _rate_on(device: torch.device) -> Rate:
    tokens, width, out = _CPU_SHAPE if device.type == "cpu" else _GPU_SHAPE
    left = torch.randn(tokens, width, device=device)
    right = torch.randn(out, width, device=device).T  # as a linear layer holds its weight

    def rate(dtype: torch.dtype, seconds: float) -> float:
        return products_per_second(left.to(dtype), right.to(dtype), seconds)

    return rate


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

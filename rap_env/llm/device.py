"""Which device and which dtype a model runs in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from pathlib import Path

import torch

from rap_env.errors import UnknownNameError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
_CLEAR_GAIN = 1.2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(name: str = "auto") -> torch.device:
    """The device for a name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Args:
        name: ``"auto"`` takes the first CUDA device if there is one, else the CPU.

    Raises:
        UnknownNameError: There is no such device on this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    if name == "cuda" and count:
        return torch.device("cuda:0")
    known = ["auto", "cpu", *(f"cuda:{index}" for index in range(count))]
    if name in known:
        return torch.device(name)
    hint = "" if count else "This machine has no CUDA device that torch can use."
    raise UnknownNameError("device", name, known, hint)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; ``"auto"`` is bfloat16 where the hardware multiplies it, else float32.

    Args:
        name: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: Where the model will run.

    Raises:
        UnknownNameError: It is another name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UnknownNameError("dtype", name, ["auto", *DTYPES])
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AMX or AVX512-BF16).

    Without them torch emulates bfloat16, slower than float32.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return any(found.get(flag) for flag in _BFLOAT16_FLAGS)
    return _listed_in(Path("/proc/cpuinfo"))  # torch before 2.10 cannot be asked in public


def device_kind(device: torch.device) -> str:
    """The processor as far as it decides how sums are rounded, for keys of scores."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    extra = [flag for flag in _BFLOAT16_FLAGS if found.get(flag)]
    return "+".join([f"cpu:{torch.backends.cpu.get_cpu_capability()}", *extra])


def fastest_threads(seconds: float = 0.4) -> int:
    """How many torch threads multiply fastest on this machine as it is now.

    Threads that spin while they wait for each other make a busy machine slower, not faster
    (nine times, on two cores with other work), so this is measured and not guessed. More
    threads are taken only for a clear gain.

    Args:
        seconds: Time to spend on each candidate (powers of two up to the cores).
    """
    before = torch.get_num_threads()
    left, right = torch.randn(256, 576), torch.randn(576, 1536)
    best, best_rate = 1, 0.0
    threads = 1
    try:
        while threads <= (os.cpu_count() or 1):
            torch.set_num_threads(threads)
            rate = _products_per_second(left, right, seconds)
            if rate > _CLEAR_GAIN * best_rate:
                best, best_rate = threads, rate
            threads *= 2
    finally:
        torch.set_num_threads(before)
    return best


def _products_per_second(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    left @ right  # the first product starts the threads
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        left @ right
        done += 1
    return done / (time.perf_counter() - began)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors instead of giving it back.

    Every forward pass frees and asks for the same hundred megabytes; taking them from the
    system anew cost an eighth of the time. At most 1 GiB is held back. Without effect
    elsewhere than on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, 2**30)


def _listed_in(cpuinfo: Path) -> bool:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return any(flag in flags for flag in _BFLOAT16_FLAGS)

"""Device, dtype and threads of a model, resident memory, and products of emulated bfloat16.

A CPU without instructions for products of bfloat16 matrices emulates them at a fifth to a
quarter of its speed in float32. Widening both factors, multiplying in float32 and rounding
the product gives the same sums up to their order, and takes a quarter of the time for the
hundreds of rows that scores, fits and prefills multiply (`in_float32`). For single rows, as
in decoding, it is slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rap_env.errors import (
    InvalidRequestError,
    MemorySourceError,
    UnknownNameError,
    counted,
)

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Capabilities of CPUs that multiply bfloat16 matrices without emulation."""
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)")  # range, rights, inode
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_EARLY_BYTES, _MMAP_MAX = 2**17, 2**16  # glibc's own defaults, which it raises on its own


def choose_device(name: str = "auto") -> torch.device:
    """The device for a name: ``"auto"`` (CUDA if any), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
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
    """The dtype for a name; ``"auto"`` is the shortest one that the processor has instructions for.

    That is bfloat16 on CPUs with AMX or AVX512-BF16 and on CUDA devices from Ampere on;
    float16 on older CUDA devices with matrix units (V100, T4): it has less range, and a model
    that leaves it raises a `NonFiniteScoreError`; and float32 elsewhere, where the others are
    emulated.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UnknownNameError("dtype", name, ["auto", *DTYPES])
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        if generation >= 7:
            return torch.bfloat16 if generation >= 8 else torch.float16
    elif device.type == "cpu" and any(cpu_capabilities().get(flag) for flag in BFLOAT16_FLAGS):
        return torch.bfloat16
    return torch.float32


def device_kind(device: torch.device) -> str:
    """The kind of processor, which determines the rounding of sums; part of the keys of scores."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    capabilities = cpu_capabilities()
    extra = [flag for flag in BFLOAT16_FLAGS if capabilities.get(flag)]
    return "+".join([f"cpu:{torch.backends.cpu.get_cpu_capability()}", *extra])


def cpu_capabilities() -> dict[str, Any]:
    """What torch says of this machine's CPU by name; nothing in versions that cannot tell."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dict(capabilities)


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device: itself if it is there already; nothing waits for a CUDA device."""
    if values.device == device:
        return values
    if device.type != "cuda":
        return values.to(device)
    return (values if values.is_cuda else values.pin_memory()).to(device, non_blocking=True)


def synchronise(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work; a no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device for new tensors: free, or reserved by torch and not in use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def use_threads(number: int) -> None:
    """Set the number of torch threads of this process, and log it.

    The library itself never calls it: torch's default (one thread per core) is used until you
    do. Threads that spin while they wait for each other can make a busy machine slower.
    Rounding depends on the number, so compare only scores that were computed with the same
    one.

    Raises:
        InvalidRequestError: The number is below 1.
    """
    if number < 1:
        raise InvalidRequestError(f"The number of threads must be at least 1, not {number}.")
    torch.set_num_threads(number)
    log.info("torch uses %s.", counted(number, "thread"))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for later tensors instead of returning it to the system.

    For scoring: every pass frees and allocates the same hundred megabytes. Getting them from
    the system again took an eighth of the time of a pass, and two thirds of that of a loss
    over 200 MB of logits. At most 1 GiB is kept. Has an effect only on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):  # older versions reject more than 32 MiB
            mallopt(_M_MMAP_MAX, 0)


def own_pages(nbytes: int, *, huge: bool = False) -> torch.Tensor:
    """Memory in pages of its own, (nbytes,) uint8, which return to the system once it is freed.

    In the heap of the C library it would leave a hole between smaller, younger tensors.
    `huge` asks for huge pages, where the system has them.
    """
    if nbytes < mmap.PAGESIZE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def free_memory_early() -> None:
    """Let the C library give large tensors pages of their own, which return to the system at once.

    For serving, where resident memory counts, and for loading. In the heap, a freed tensor
    leaves a hole that the next one may not use: a prefill of 450 tokens of the default model
    took 17 MiB more than its tensors, and takes 8 MiB this way. The opposite of
    `keep_freed_memory`; the last call holds. Has an effect only on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, _MMAP_MAX)
        mallopt(_M_MMAP_THRESHOLD, _EARLY_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _EARLY_BYTES)


def bound_kernel_caches() -> None:
    """Limit the number of compiled kernels that oneDNN caches, one for each shape.

    A server sees thousands of sequence lengths, and half a megabyte for each looks like a
    memory leak. Compiling a kernel again takes no measurable time. Call this before the first
    product, which creates the caches. Environment variables that are already set keep their
    values.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def drop_unused_pages() -> None:
    """Take the pages of mapped files out of resident memory; those in use are mapped again.

    Importing and loading touch a hundred megabytes of libraries that serving never needs
    again. They stay in the system's page cache, so a later use costs no reading. Only for
    mappings that are read and hold no page of their own; has an effect only on Linux.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL("libc.so.6").madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        begin, size = 0, 0
        for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
            match = _MAPPING.match(line)
            if match is not None:
                begin = int(match[1], 16)
                is_file = "w" not in match[3] and match[4] != "0"
                size = int(match[2], 16) - begin if is_file else 0
            elif size and line.split()[:2] == ["Anonymous:", "0"]:
                madvise(begin, size, mmap.MADV_DONTNEED)


def return_freed_memory(device: torch.device | None = None) -> None:
    """Return freed memory to the system, so that resident memory falls, and to other processes.

    For use after much memory was freed; it takes milliseconds. On a CPU it is what the C
    library keeps, which has an effect only on Linux with glibc; on a CUDA device, which is
    named, also what torch's allocator keeps.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()  # of all devices
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes(process: Path = Path("/proc/self")) -> tuple[int, int]:
    """Most resident bytes of a process (Linux) since it began or its mark was reset, and those now.

    Raises:
        MemorySourceError: The kernel does not report them.
    """
    try:
        return mark_and_resident((process / "status").read_bytes())
    except OSError as error:
        raise MemorySourceError(f"The memory of this process cannot be read: {error}.") from error


def mark_and_resident(status: bytes) -> tuple[int, int]:
    """The high-water mark and the resident bytes in the text of a file ``status``."""
    mark, now = (
        int(status[status.index(name) + len(name) :].split(None, 1)[0]) * 1024
        for name in (b"VmHWM:", b"VmRSS:")
    )
    return mark, now


# How many are in float32 at a time: it bounds the memory, and a product of such pieces is as
# fast.
_WEIGHTS = 2**20
TOKENS_AT_ONCE = 256
"""Tokens that are multiplied in float32 at a time."""


@lru_cache(maxsize=1)
def emulated() -> bool:
    """Whether this machine's CPU has no instructions for products of bfloat16 matrices."""
    capabilities = cpu_capabilities()
    is_x86 = capabilities.get("architecture") == "x86_64"
    return is_x86 and not any(capabilities.get(flag) for flag in BFLOAT16_FLAGS)


def uses_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `in_float32` changes how matrices of this dtype are multiplied on a device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and emulated()


def in_float32(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Multiply bfloat16 matrices of linear layers in float32 in a ``with`` block, if emulated.

    Results are bfloat16, and gradients pass. Holds in the calling thread. For a model of
    another dtype, nothing is changed.
    """
    changes = dtype == torch.bfloat16 and emulated()
    return _Products(linear, dtype) if changes else contextlib.nullcontext()


def linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `torch.nn.functional.linear`, (..., in) to (..., out); through float32 if emulated."""
    if not uses_float32(states.device, states.dtype):
        return functional.linear(states, weight, bias)
    rows, out_features = states.reshape(-1, states.shape[-1]), len(weight)
    product = states.new_empty(len(rows), out_features)
    step = _weight_rows(weight.shape[1], out_features)
    for first in range(0, out_features, step):
        part = slice(first, first + step)
        wide, wide_bias = weight[part].float(), None if bias is None else bias[part].float()
        for start in range(0, len(rows), TOKENS_AT_ONCE):
            some = slice(start, start + TOKENS_AT_ONCE)
            product[some, part] = functional.linear(rows[some].float(), wide, wide_bias)
    return product.view(*states.shape[:-1], out_features)


def in_bfloat16() -> AbstractContextManager[object]:
    """Multiply float32 states of linear layers in bfloat16 in a ``with`` block.

    Results are float32 again, and gradients pass. Weights may be of either dtype.
    """
    return _Products(_bfloat16_linear, torch.float32)


def _bfloat16_linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product = functional.linear(states.bfloat16(), weight.bfloat16()).to(states.dtype)
    return product if bias is None else product + bias


class _Products(TorchFunctionMode):
    """Linear layers with another product, for states of a dtype."""

    def __init__(self, product: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._product, self._dtype = product, dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is functional.linear:
            return self._product(*args, **named)
        if func is torch.addmm and not named and args[1].dtype == self._dtype:
            bias, states, weight = args  # GPT-2's Conv1D
            return self._product(states, weight.T, bias)
        return func(*args, **named)


def _weight_rows(in_features: int, out_features: int) -> int:
    return min(out_features, max(1, _WEIGHTS // in_features))

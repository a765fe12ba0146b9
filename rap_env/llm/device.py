"""Which device and which dtype a model runs in, on how many threads."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os

import torch

from rap_env.errors import UnknownNameError
from rap_env.llm.rates import CLEAR_GAIN, products_per_second, remembered_dtype

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


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
    """The dtype for a name; ``"auto"`` is bfloat16 where it was measured to be faster.

    The first time on a kind of processor that takes half a second; then it is remembered in the
    cache folder (see `rap_env.llm.rates.remembered_dtype`).

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
    return remembered_dtype(device, device_kind(device))


def device_kind(device: torch.device) -> str:
    """The processor as far as it decides how sums are rounded, for keys of scores."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    extra = [flag for flag in _BFLOAT16_FLAGS if found.get(flag)]
    return "+".join([f"cpu:{torch.backends.cpu.get_cpu_capability()}", *extra])


def use_threads(number: int | str = "auto") -> int:
    """Let torch use so many threads from now on in this process; the log says how many.

    Nothing in the library calls it: torch's own choice (a thread for each core) holds until you
    do. Rounding depends on the number, so scores that are to be compared need the same one.

    Args:
        number: A number of threads, or ``"auto"`` for what `fastest_threads` finds.

    Returns:
        The number of threads.

    Raises:
        UnknownNameError: It is neither ``"auto"`` nor a whole number of at least 1.
    """
    if number == "auto":
        number = fastest_threads()
    if not isinstance(number, int) or number < 1:
        hint = "Give that, or a whole number of at least 1."
        raise UnknownNameError("number of threads", number, ["auto"], hint)
    torch.set_num_threads(number)
    log.info("torch uses %d thread%s.", number, "" if number == 1 else "s")
    return number


def fastest_threads(seconds: float = 0.4) -> int:
    """How many torch threads multiply fastest on this machine as it is now.

    Threads that spin while they wait for each other make a busy machine slower, not faster
    (nine times, on two cores with other work), so this is measured and not guessed. More
    threads are taken only for a clear gain. The log says what was measured.

    Args:
        seconds: Time to spend on each candidate (powers of two up to the cores).
    """
    before = torch.get_num_threads()
    left, right = torch.randn(256, 576), torch.randn(576, 1536)
    rates: dict[int, float] = {}
    best, threads = 1, 1
    try:
        while threads <= (os.cpu_count() or 1):
            torch.set_num_threads(threads)
            rates[threads] = products_per_second(left, right, seconds)
            if rates[threads] > CLEAR_GAIN * rates[best]:
                best = threads
            threads *= 2
    finally:
        torch.set_num_threads(before)
    found = ", ".join(f"{n}: {rate:.0f}" for n, rate in rates.items())
    log.info("Products a second by number of threads: %s; %d is chosen", found, best)
    return best


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors instead of giving it back.

    Every forward pass frees and asks for the same hundred megabytes; taking them from the
    system anew cost an eighth of the time, and two thirds of that of a loss over 200 MB of
    logits. At most 1 GiB is held back. Without effect elsewhere than on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):  # older ones refuse more than 32 MiB
            mallopt(_M_MMAP_MAX, 0)


def bound_kernel_caches() -> None:
    """Let oneDNN keep few of the kernels that it compiles, one for each shape that it ever saw.

    With the lengths of a service's requests these are thousands, half a megabyte each, which looks
    like a leak; making one anew takes no time that could be measured. To be called before the
    first product: the caches are made then. Whoever has set the variables keeps their values.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def return_freed_memory() -> None:
    """Give memory that the C library holds back to the system, so that resident memory falls.

    The other half of `keep_freed_memory`, for moments when much was freed and others need it; it
    takes milliseconds. Without effect elsewhere than on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)

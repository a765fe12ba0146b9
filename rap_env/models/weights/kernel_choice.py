"""Choice between two ways to compute a product, by its number of rows: measured once, kept on disk.

A packed kernel takes a time that grows fast with the rows; widening the weights first takes a
constant time and little for each row.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import torch

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.models.device import device_kind
from rap_env.models.weights.bfloat16_products import uses_float32
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)

Product = Callable[[torch.Tensor], object]
"""Computes the product for states (rows, in)."""

CANDIDATES = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that are measured."""

_REPEATS = 5
_KIND, _VERSION = "rap-env.packed-kernel-rows", 1


def most_rows(kernel: Product, widening: Product, inputs: int, dtype: torch.dtype) -> int:
    """The largest of `CANDIDATES` for which `kernel` is faster than `widening`, or 0.

    Found by bisection; the best of several alternating runs counts, so that other load on the
    machine does not decide.
    """

    def faster(index: int) -> bool:
        states = torch.zeros(CANDIDATES[index], inputs, dtype=dtype)
        return _seconds(kernel, states) <= _seconds(widening, states)

    low, high = 0, len(CANDIDATES)  # the kernel is faster at low, and slower at high
    if not faster(low):  # torch has no fast kernel for every dtype
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if faster(middle) else (low, middle)
    return CANDIDATES[low]


def remembered_rows(
    name: str, kernel: Product, widening: Product, inputs: int, dtype: torch.dtype
) -> int:
    """The result of `most_rows`, once for each kind of processor, threads and version of torch.

    It is kept in the cache folder (``rows-*.json``; delete it to measure again), so that the same
    machine always computes in the same way.

    Args:
        name: Name of the kernel, part of the key.
        kernel: The packed kernel.
        widening: The other way.
        inputs: Inputs of the matrix that both multiply with.
        dtype: Dtype of the states.
    """
    key = {
        "kernel": name,
        "dtype": str(dtype),
        "processor": device_kind(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({"widened": "float32"} if uses_float32(torch.device("cpu"), dtype) else {}),
    }
    path = cache_dir() / f"rows-{digest(key)[:16]}.json"
    with contextlib.suppress(OSError, ArtifactError, KeyError, TypeError, ValueError):
        return int(load_artifact(path, _KIND, _VERSION)["rows"])
    rows = most_rows(kernel, widening, inputs, dtype)
    log.info("The %s kernel is used for up to %d rows of %s", name, rows, dtype)
    with contextlib.suppress(OSError):
        save_artifact(path, _KIND, _VERSION, {**key, "rows": rows})
    return rows


def _seconds(product: Product, states: torch.Tensor) -> float:
    product(states)  # the first one allocates
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        product(states)
        best = min(best, time.perf_counter() - began)
    return best

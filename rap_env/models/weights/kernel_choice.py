"""Choice between two ways to compute a product, by its number of rows: measured once, kept on disk.

A packed kernel takes a time that grows fast with the rows; widening the weights first takes a
constant time and little for each row.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rap_env.models.device import device_kind, remembered
from rap_env.models.weights.bfloat16_products import uses_float32

Product = Callable[[torch.Tensor], object]
"""Computes the product for states (rows, in)."""

CANDIDATES = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that are measured."""

_REPEATS = 5


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
    """The result of `most_rows`, once for each kind of processor and threads (`remembered`).

    Args:
        name: Name of the kernel, part of the key.
        kernel: The packed kernel.
        widening: The other way.
        inputs: Inputs of the matrix that both multiply with.
        dtype: Dtype of the states.
    """
    about = {
        "kernel": name,
        "dtype": str(dtype),
        "processor": device_kind(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        **({"widened": "float32"} if uses_float32(torch.device("cpu"), dtype) else {}),
    }

    def measure() -> int:
        return most_rows(kernel, widening, inputs, dtype)

    return int(remembered("rows", "rap-env.packed-kernel-rows", about, measure))


def _seconds(product: Product, states: torch.Tensor) -> float:
    product(states)  # the first one allocates
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        product(states)
        best = min(best, time.perf_counter() - began)
    return best

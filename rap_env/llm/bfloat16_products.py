"""Products of bfloat16 matrices on a CPU without instructions for them: through float32.

Such a CPU emulates bfloat16 at a fifth to a quarter of its speed in float32. Widening both factors,
multiplying in float32 and rounding the product gives the same sums up to their order, and takes a
quarter of the time for the hundreds of rows that scores and fits multiply. For single rows, as in
decoding, it is slower. Other devices and dtypes are not affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rap_env.llm.device import BFLOAT16_FLAGS, cpu_capabilities

_PIECE_ELEMENTS = 2**20  # of the weights that are in memory in float32 at a time


@lru_cache(maxsize=1)
def emulated() -> bool:
    """Whether this machine's CPU has no instructions for products of bfloat16 matrices."""
    found = cpu_capabilities()
    is_x86 = found.get("architecture") == "x86_64"
    return is_x86 and not any(found.get(flag) for flag in BFLOAT16_FLAGS)


def uses_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `in_float32` changes how matrices of this dtype are multiplied on a device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and emulated()


def in_float32() -> AbstractContextManager[object]:
    """Multiply bfloat16 matrices of linear layers in float32 in a ``with`` block, if emulated.

    Results are bfloat16, and gradients pass. Holds in the calling thread.
    """
    return _Float32Products() if emulated() else contextlib.nullcontext()


def extra_bytes(
    device: torch.device, dtype: torch.dtype, tokens: int, in_features: int, out_features: int
) -> int:
    """Most bytes that a product of so many tokens takes for a moment, more than the plain one."""
    if not uses_float32(device, dtype):
        return 0
    rows = _piece_rows(in_features, out_features)
    return 4 * (tokens * (in_features + rows) + rows * in_features)


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is functional.linear and _is_emulated(args[0]):
            return _linear(*args, **named)
        if func is torch.addmm and not named and _is_emulated(args[0]):  # GPT-2's Conv1D
            bias, states, weight = args
            return _linear(states, weight.T, bias)
        return func(*args, **named)


def _is_emulated(states: torch.Tensor) -> bool:
    return states.dtype == torch.bfloat16 and states.device.type == "cpu"


def _linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(..., in), (out, in) and (out,) to (..., out), a few rows of the weights at a time."""
    wide, out_features = states.float(), len(weight)
    rows = _piece_rows(weight.shape[1], out_features)
    product = states.new_empty(*states.shape[:-1], out_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        piece_bias = None if bias is None else bias[part].float()
        product[..., part] = functional.linear(wide, weight[part].float(), piece_bias)
    return product


def _piece_rows(in_features: int, out_features: int) -> int:
    return min(out_features, max(1, _PIECE_ELEMENTS // in_features))

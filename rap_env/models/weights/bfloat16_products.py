"""Products of bfloat16 matrices on a CPU without instructions for them: through float32.

Such a CPU emulates bfloat16 at a fifth to a quarter of its speed in float32. Widening both factors,
multiplying in float32 and rounding the product gives the same sums up to their order, and takes a
quarter of the time for the hundreds of rows that scores, fits and prefills multiply. For single
rows, as in decoding, it is slower. Other devices and dtypes are not affected.
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

from rap_env.models.device import BFLOAT16_FLAGS, cpu_capabilities

# How many are in float32 at a time: it bounds the memory, and a product of such pieces is as fast.
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


def in_float32() -> AbstractContextManager[object]:
    """Multiply bfloat16 matrices of linear layers in float32 in a ``with`` block, if emulated.

    Results are bfloat16, and gradients pass. Holds in the calling thread.
    """
    return _Float32Products() if emulated() else contextlib.nullcontext()


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


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is functional.linear:
            return linear(*args, **named)
        if func is torch.addmm and not named and uses_float32(args[1].device, args[1].dtype):
            bias, states, weight = args  # GPT-2's Conv1D
            return linear(states, weight.T, bias)
        return func(*args, **named)


def _weight_rows(in_features: int, out_features: int) -> int:
    return min(out_features, max(1, _WEIGHTS // in_features))

"""A GPU that is only pretended: real values, computed on the CPU, that raise where CUDA would.

A tensor is on the GPU if its storage is marked, so that all views of it are there too. Operations
on tensors of both devices raise, as do NumPy arrays of a tensor on the GPU. Speed, rounding,
memory, streams and sizes that depend on data are not pretended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
MEMORY_BYTES = 2**33

_MARK = "on_pretended_gpu"
_aten = torch.ops.aten
_TAKE_CPU_ARGUMENTS = {  # CUDA copies these from the CPU: sources of a copy, and indices
    _aten.copy_,
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
}
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
_READS = {torch.Tensor.numpy, torch.Tensor.__array__}
_WAITS = {  # what a CUDA tensor's values are read with, which waits for the device
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    return getattr(tensor.untyped_storage(), _MARK, False)


@dataclass
class Waits:
    """How often values of the GPU were read, which waits for it, or sent to it without pinning."""

    count: int = 0


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """Let torch have one GPU in a ``with`` block; yields what waited for it."""
    waits = Waits()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended",
        "get_device_capability": (8, 0),
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "set_rng_state": None,
        "synchronize": None,
    }
    fakes: dict[str, Any] = {
        name: mock.Mock(return_value=answer) for name, answer in answers.items()
    }
    fakes["get_rng_state"] = mock.Mock(side_effect=lambda *_: torch.get_rng_state())
    with mock.patch.multiple(torch.cuda, **fakes), _Operations(), _Places(waits):
        yield waits


class _Operations(TorchDispatchMode):
    """Checks the devices of each operation, and marks its results."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        places = {on_gpu(tensor) for tensor in tensors if tensor.dim()}  # numbers may be anywhere
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            places.add(False)
        if len(places) > 1 and func.overloadpacket not in _TAKE_CPU_ARGUMENTS:
            raise RuntimeError(f"{func} got tensors of the CPU and of the pretended GPU.")
        there = any(map(on_gpu, tensors))
        if func.overloadpacket is _aten.histc and there:  # the CPU has it for floats only
            args = (args[0].float(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if there and func.overloadpacket is not _aten.copy_:  # a copy stays where it was
            _mark(result)
        return result


class _Places(TorchFunctionMode):
    """Answers where a tensor is, moves tensors, and makes new ones on the named device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func == torch.Tensor.device.__get__:  # made anew at each access
            return GPU if on_gpu(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return on_gpu(args[0])
        if func is torch.Tensor.pin_memory:  # the pretended GPU's host memory is all alike
            return args[0]
        if func in _WAITS and on_gpu(args[0]):
            self._waits.count += 1
        if func in _READS and on_gpu(args[0]):
            raise TypeError("A tensor on the pretended GPU has no NumPy array; copy it first.")
        named = next(filter(_is_place, (*args[1:], *options.values())), None)
        if func in _MOVES:
            return self._move(func, args, options, named)
        if named is None or torch.device(named).type != "cuda":
            return func(*args, **options)
        return _mark(func(*_on_cpu(args), **_on_cpu(options)))

    def _move(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        options: dict[str, Any],
        named: Any,
    ) -> torch.Tensor:
        tensor, *given = args
        like = next((value for value in given if isinstance(value, torch.Tensor)), None)
        if named is not None:
            there = torch.device(named).type == "cuda"
        elif like is not None:
            there, given = on_gpu(like), [like.dtype]
        else:
            there = {torch.Tensor.cuda: True, torch.Tensor.cpu: False}.get(func, on_gpu(tensor))
        if func is torch.Tensor.to:
            tensor = func(tensor, *_on_cpu(given), **_on_cpu(options))
        if there == on_gpu(tensor):
            return tensor
        self._waits.count += not options.get("non_blocking", False)
        with _disable_current_modes():
            copied = tensor.clone()
        return _mark(copied) if there else copied


def _is_place(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")


def _on_cpu(values: Any) -> Any:
    """The values with every device replaced by the CPU."""
    return tree_map(lambda value: "cpu" if _is_place(value) else value, values)


def _mark(values: Any) -> Any:
    """Put all tensors among some values on the GPU."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            setattr(leaf.untyped_storage(), _MARK, True)
    return values

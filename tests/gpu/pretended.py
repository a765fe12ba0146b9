"""A GPU that is only pretended: real values, computed on the CPU, that raise where CUDA would.

A tensor is on the GPU if its storage is marked, so that all views of it are there too. Operations
on tensors of both devices raise, as do NumPy arrays of a tensor on the GPU. Speed, rounding,
memory, streams, gradients and sizes that depend on data are not pretended.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
MEMORY_BYTES = 2**33

_MARK = "pretended_gpu"
_aten = torch.ops.aten
_TAKE_CPU_INDICES = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
_READS = {torch.Tensor.numpy, torch.Tensor.__array__}
_WAITS = {  # what a CUDA tensor's values are read with, which waits for the device
    torch.equal,
    torch.Tensor.equal,
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


def place_of(tensor: torch.Tensor) -> torch.device:
    """The device that a tensor is on."""
    return GPU if on_gpu(tensor) else CPU


@dataclass
class Waits:
    """How often something waited for the GPU, and how often it did not have to.

    Attributes:
        count: Values of the GPU that were read, or sent to it without pinning (also by
            ``torch.tensor``).
        pinned: Bytes of each allocation of pinned memory.
    """

    count: int = 0
    pinned: list[int] = field(default_factory=list)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """Let torch have a GPU in a ``with`` block; yields what waited for it."""
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
        operation = func.overloadpacket
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        if operation in _TAKE_CPU_INDICES and on_gpu(args[0]):
            indices = [index for index in args[1] if index is not None and on_gpu(index)]
            tensors = [args[0], *indices, *tree_leaves(args[2:])]
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            tensors.append(torch.empty(1))
        if operation is _aten.copy_:  # it may cross devices, and its result stays where it was
            return func(*args, **(kwargs or {}))
        place = _one_place(func, tensors)
        in_place = operation.__name__.endswith("_") and isinstance(args[0], torch.Tensor)
        if in_place and place_of(args[0]) != place:
            raise RuntimeError(f"{func} got a number of the CPU to change with one of {place}.")
        if operation is _aten.histc and place != CPU:  # the CPU has it for floats only
            args = (args[0].float(), *args[1:])
        result = func(*args, **(kwargs or {}))
        return result if place == CPU else _mark(result, place)


def _one_place(func: Any, values: Iterable[Any]) -> torch.device:
    """The device of the tensors that an operation gets; a number of the CPU may be anywhere."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    places = {place_of(tensor) for tensor in tensors if tensor.dim() or on_gpu(tensor)}
    if len(places) > 1:
        raise RuntimeError(f"{func} got tensors of {' and '.join(sorted(map(str, places)))}.")
    return places.pop() if places else CPU


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
        options = dict(kwargs or {})
        if options.pop("pin_memory", False):  # the CPU's memory is all alike
            made: torch.Tensor = func(*args, **options)
            self._waits.pinned.append(made.nbytes)
            return made
        if func == torch.Tensor.device.__get__:  # made anew at each access
            return place_of(args[0]) if on_gpu(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return on_gpu(args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in _WAITS and on_gpu(args[0]):
            self._waits.count += 1
        if func in _READS and on_gpu(args[0]):
            raise TypeError("A tensor on a pretended GPU has no NumPy array; copy it first.")
        if func in _MOVES:
            return self._move(func, args, options)
        named = next(filter(_is_place, (*args[1:], *options.values())), None)
        if named is None or torch.device(named).type not in ("cpu", "cuda"):
            return func(*args, **options)
        if func is torch.tensor and torch.device(named).type == "cuda":
            self._waits.count += 1  # its values are copied from memory that is not pinned
        return _mark(func(*_on_cpu(args), **_on_cpu(options)), _indexed(named))

    def _move(
        self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> torch.Tensor:
        tensor, *given = args
        named = next(filter(_is_place, (*given, *options.values())), None)
        like = next((value for value in given if isinstance(value, torch.Tensor)), None)
        if named is not None and torch.device(named).type == "meta":
            return cast(torch.Tensor, func(*args, **options))
        if named is not None:
            there = _indexed(named)
        elif like is not None:
            there, given = place_of(like), [like.dtype]
        else:
            there = {torch.Tensor.cuda: GPU, torch.Tensor.cpu: CPU}.get(func, place_of(tensor))
        if func is torch.Tensor.to:
            tensor = func(tensor, *_on_cpu(given), **_on_cpu(options))
        if there == place_of(tensor):
            return tensor
        self._waits.count += not options.get("non_blocking", False)
        with _disable_current_modes():
            copied: torch.Tensor = _mark(tensor.clone(), there)
        return copied


def _is_place(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")


def _indexed(place: torch.device | str) -> torch.device:
    """A device with its number."""
    return GPU if torch.device(place).type == "cuda" else CPU


def _on_cpu(values: Any) -> Any:
    """The values with every device replaced by the CPU."""
    return tree_map(lambda value: "cpu" if _is_place(value) else value, values)


def _mark(values: Any, place: torch.device) -> Any:
    """Put all tensors among some values on a device."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            setattr(leaf.untyped_storage(), _MARK, place == GPU)
    return values

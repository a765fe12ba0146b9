"""The devices of a live model whose layers are spread over several GPUs.

``device_map`` of transformers spreads a model with hooks of accelerate, which replace the `forward`
of every module. They are removed here. Each layer gets a hook of its own instead, that brings what
the layer is called with to the layer's device. Both blocks of a layer are on that device, with
their caches and stubs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rap_env.errors import UnsupportedModelError
from rap_env.models.device import send
from rap_env.models.families.adapter import FamilyAdapter
from rap_env.models.weights.tensors import named_weights


@dataclass(frozen=True)
class DeviceMap:
    """Where the parts of a model are.

    Attributes:
        embeddings: Device of the embeddings, where token ids are sent.
        layers: Device of each layer, (L,).
        head: Device of the head, where the decoder's output is sent.
    """

    embeddings: torch.device
    layers: tuple[torch.device, ...]
    head: torch.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, each once, that of the embeddings first."""
        return tuple(dict.fromkeys((self.embeddings, *self.layers, self.head)))


def find_device_map(model: Any, adapter: FamilyAdapter, name: str) -> DeviceMap | None:
    """Where a model's parts are, if it is on several GPUs; None if it is on one device."""
    places = {str(weight.device) for weight in model.parameters() if not weight.is_meta}
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        mapped = getattr(model, "hf_device_map", {}).values()
        places |= {f"cuda:{place}" if isinstance(place, int) else str(place) for place in mapped}
    if len(places) < 2:
        return None
    if not all(place.startswith("cuda") for place in places):
        raise UnsupportedModelError(
            f"The weights of {name} are on several devices ({', '.join(sorted(places))}), but a "
            "model must be on one, or on GPUs alone: give a device_map without 'cpu' and 'disk', "
            "or load it with rap_env's load_llm(). If it is too large, weights='int4' takes a "
            "quarter of the bytes, and max_memory_bytes streams the layers from its files."
        )
    parts = {
        "the embeddings": model.get_input_embeddings(),
        "the head": model.get_output_embeddings(),
    }
    first, last = (_device_of(module, part) for part, module in parts.items())
    layers = enumerate(adapter.layers(model))
    return DeviceMap(first, tuple(_device_of(m, f"layer {n}") for n, m in layers), last)


def _device_of(module: nn.Module, part: str) -> torch.device:
    devices = {str(tensor.device) for _, tensor in named_weights(module)}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"The weights of {part} are on {len(devices)} devices ({', '.join(sorted(devices))}); "
            "give a device_map that keeps each layer whole, and load pruned models on one device."
        )
    return torch.device(devices.pop())


def install_device_map(model: Any, adapter: FamilyAdapter, devices: DeviceMap) -> None:
    """Replace accelerate's hooks by those of a device map."""
    remove_hooks(model.modules())
    decoder, layers = adapter.decoder(model), list(adapter.layers(model))
    arrivals = _Arrivals(devices)
    decoder.register_forward_pre_hook(arrivals.enter, with_kwargs=True)
    decoder.register_forward_hook(arrivals.leave, always_call=True)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [m for m in decoder.modules() if inside.isdisjoint(m.modules())]
    for layer, device in zip(layers, devices.layers, strict=True):
        layer.register_forward_pre_hook(_Arrival(arrivals, device), with_kwargs=True)
    for module in outside:
        weight = next(module.parameters(recurse=False), None)
        # Without weights it makes rotary tables, which are used where hidden states start.
        device = devices.embeddings if weight is None else weight.device
        module.register_forward_pre_hook(_Arrival(arrivals, device), with_kwargs=True)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    """Remove accelerate's hooks from modules, and the `forward` that they leave there."""
    from accelerate.hooks import remove_hook_from_module

    for module in modules:
        remove_hook_from_module(module)
        left = getattr(module.__dict__.get("forward"), "__func__", None)
        if left is type(module).forward:  # a shallow copy would run that of the original
            del module.forward


class _Arrivals:
    """Sends what modules are called with to their devices.

    Arguments that all layers share (positions, rotary tables, attention masks) are sent to a device
    once in a pass of the decoder; the copies are kept until it ends.
    """

    def __init__(self, devices: DeviceMap) -> None:
        self._devices = devices
        self._shared: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(
        self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._shared.clear()
        device = self._devices.embeddings
        return _map(args, lambda t: send(t, device)), _map(kwargs, lambda t: send(t, device))

    def leave(self, _decoder: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        self._shared.clear()
        if isinstance(output, tuple):
            return (send(output[0], self._devices.head), *output[1:])
        if output is not None:
            output.last_hidden_state = send(output.last_hidden_state, self._devices.head)
        return output

    def shared(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on a device, sent there once in a pass."""
        if values.device == device:
            return values
        key = (id(values), device)
        if key not in self._shared:  # the original is kept too, so that its id stays its own
            self._shared[key] = (values, send(values, device))
        return self._shared[key][1]


@dataclass(frozen=True)
class _Arrival:
    """Hook that brings what a module is called with to the module's device."""

    arrivals: _Arrivals
    device: torch.device

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = _map(args, lambda values: send(values, self.device))
        return moved, _map(kwargs, lambda values: self.arrivals.shared(values, self.device))


def _map(values: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the tensors among arguments; caches and other objects stay as they are."""
    if isinstance(values, torch.Tensor):
        return change(values)
    if type(values) in (tuple, list):
        return type(values)(_map(value, change) for value in values)
    if type(values) is dict:
        return {key: _map(value, change) for key, value in values.items()}
    return values


def keep_in_place(model: torch.nn.Module, reason: str) -> None:
    """From now on, refuse to move or convert a model as a whole."""
    object.__setattr__(model, "_apply", _InPlace(model, reason))


class _InPlace:
    """Stands in for `nn.Module._apply` of a model that must not be moved or converted any more.

    Other tensors (buffers of weights, copies on the host, stubs) would stay where they were, and
    a later pass would fail in the middle. What changes neither device nor dtype is allowed.
    """

    def __init__(self, model: torch.nn.Module, reason: str) -> None:
        self._model, self._reason = model, reason

    def __call__(
        self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> torch.nn.Module:
        places = {str(w.device): w for w in self._model.parameters() if not w.is_meta}
        for weight in places.values():
            self._check(weight.new_empty(0), change)
        moved: torch.nn.Module = torch.nn.Module._apply(self._model, change, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _check(self, probe: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        changed = change(probe)
        if (changed.device, changed.dtype) != (probe.device, probe.dtype):
            raise UnsupportedModelError(
                f"The model cannot be moved or converted ({probe.device}, {probe.dtype} to "
                f"{changed.device}, {changed.dtype}), because {self._reason}: load it as it is to "
                "be, load_llm(device=..., dtype=...), and then set its residency and attach stubs."
            )

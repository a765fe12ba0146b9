"""Where the weights of a live model are: on one device, which others must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from rap_env.errors import UnsupportedModelError


def check_one_device(model: Any, name: str) -> None:
    """Raise an error if the weights of a model are on several devices, or on disk."""
    places = {str(weight.device) for weight in model.parameters() if not weight.is_meta}
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        mapped = getattr(model, "hf_device_map", {}).values()
        places |= {f"cuda:{place}" if isinstance(place, int) else str(place) for place in mapped}
    if len(places) > 1:
        raise UnsupportedModelError(
            f"The weights of {name} are on several devices ({', '.join(sorted(places))}), but a "
            "model must be on one GPU or on the CPU: load it without a device_map, or with "
            "rap_env's load_llm(device=...). If it is too large, weights='int4' takes a quarter of "
            "the bytes."
        )


def remove_hooks(modules: Iterable[nn.Module]) -> None:
    """Remove accelerate's hooks from modules, and the `forward` that they leave there."""
    from accelerate.hooks import remove_hook_from_module

    for module in modules:
        remove_hook_from_module(module)
        left = getattr(module.__dict__.get("forward"), "__func__", None)
        if left is type(module).forward:  # a shallow copy would run that of the original
            del module.forward


def keep_in_place(model: nn.Module) -> None:
    """From now on, refuse to move or convert a model as a whole."""
    object.__setattr__(model, "_apply", _InPlace(model))


class _InPlace:
    """Stands in for `nn.Module._apply` of a model that must not be moved or converted any more.

    Other tensors (buffers of weights, copies on the host) would stay where they were, and a later
    pass would fail in the middle. What changes neither device nor dtype is allowed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(
        self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        places = {str(w.device): w for w in self._model.parameters() if not w.is_meta}
        for weight in places.values():
            self._check(weight.new_empty(0), change)
        moved: nn.Module = nn.Module._apply(self._model, change, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _check(self, probe: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        changed = change(probe)
        if (changed.device, changed.dtype) != (probe.device, probe.dtype):
            raise UnsupportedModelError(
                f"The model cannot be moved or converted ({probe.device}, {probe.dtype} to "
                f"{changed.device}, {changed.dtype}), because its residency is not "
                "'resident': load it as it is to be, load_llm(device=..., dtype=...), and then set "
                "its residency."
            )

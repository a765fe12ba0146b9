"""Modules that compute with packed weights, in the places of a model's own.

====================================  =====================  ===================================
A model's module                      Packed                 Weights while it computes
====================================  =====================  ===================================
``nn.Linear``, GPT-2's ``Conv1D``     `PackedLinear`         packed kernel, or widened
experts with 3-D parameters           `PackedExperts`        widened for the call
token embeddings                      `PackedEmbedding`      the looked-up rows
head, tied to the embeddings or not   `PackedLinear`         packed kernel, or widened
====================================  =====================  ===================================

Biases, norms, routers and learned positions are not packed: a packed module uses the bias of
the module it replaces, which stays in memory. Only inference is supported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from rap_env.models.weights.low_bits import matrix_from_tensors, tensor_shapes
from rap_env.models.weights.packing import (
    PackedLevel,
    PackedMatrix,
    buffer_in_use,
    piece_rows,
    widening_buffer,
)


class PackedModule(nn.Module):
    """Base class of modules with packed weights.

    Attributes:
        level: Level of the weights.
        dtype: Dtype of the weights in the module that it replaces.
    """

    level: PackedLevel
    dtype: torch.dtype

    def __init__(self, matrices: Mapping[str, PackedMatrix], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.level = next(iter(matrices.values())).level
        for name, matrix in matrices.items():
            for part, tensor in matrix.tensors.items():
                self.register_buffer(f"{name}_{part}", tensor)
        self.matrices = dict(matrices)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes and scales by name, as a file stores them."""
        return {
            f"{name}_{part}": tensor
            for name, matrix in self.matrices.items()
            for part, tensor in matrix.tensors.items()
        }

    def widened(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An unquantised module with the same weights, in memory of its own.

        Args:
            dtype: Of the weights; None for that of the module which it replaces.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # torch calls this to move a module; scales keep their dtype when the model changes
        # its own
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied = super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        for name, matrix in self.matrices.items():
            parts = {part: getattr(self, f"{name}_{part}") for part in matrix.tensors}
            self.matrices[name] = type(matrix)(matrix.level, matrix.shape, **parts)
        return applied


class PackedLinear(PackedModule):
    """``states @ weight.T + bias`` with packed weights.

    Args:
        matrix: The weights (out, in).
        bias: (out,), or None.
        dtype: Dtype of the weights in the module that it replaces.
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__({"weight": matrix}, dtype)
        self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        output = self.matrices["weight"].product(states)
        bias = self._parameters["bias"]  # an attribute takes ten times as long
        return output if bias is None else output.add_(bias)

    def widened(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A linear layer with the same weights, in memory of its own, and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = _fixed(self.matrices["weight"].widened(dtype or self.dtype))
        linear.register_parameter("bias", self.bias)
        return linear.eval()


class PackedEmbedding(PackedModule):
    """Token embeddings with packed rows.

    Args:
        matrix: The rows (vocabulary, hidden).
        dtype: Dtype of the embeddings.
        scale: Factor of each embedding, as Gemma has it.
    """

    embed_scale: torch.Tensor | None

    def __init__(
        self, matrix: PackedMatrix, dtype: torch.dtype, scale: torch.Tensor | None = None
    ) -> None:
        super().__init__({"weight": matrix}, dtype)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., hidden)."""
        output = self.matrices["weight"].rows(token_ids, self.dtype)
        scale = self.embed_scale
        return output if scale is None else output * scale.to(self.dtype)

    def widened(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Embeddings with the same rows, in memory of their own."""
        rows = self.matrices["weight"].widened(dtype or self.dtype)
        if self.embed_scale is not None:
            rows = rows * self.embed_scale.to(rows.dtype)
        wide: nn.Embedding = nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
        return wide


class PackedExperts(PackedModule):
    """A module with 3-D weights (experts, out, in), widened for each call of its own `forward`.

    Args:
        child: The module that it replaces.
        matrices: Its weights by the names of its parameters, each (experts * out, in).
    """

    def __init__(self, child: nn.Module, matrices: Mapping[str, PackedMatrix]) -> None:
        weights = raw_weights(child)
        super().__init__(matrices, next(iter(weights.values())).dtype)
        self._full = {name: tuple(weights[name].shape) for name in matrices}
        self._child = [_without(child, matrices)]  # in a list: it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module that it replaces returns."""
        (child,) = self._child
        sizes = [math.prod(shape) for shape in self._full.values()]
        device = next(iter(self.matrices.values())).device
        with buffer_in_use():
            buffer = widening_buffer(sum(sizes), self.dtype, device)
            for (name, shape), wide in zip(
                self._full.items(), torch.split(buffer, sizes), strict=True
            ):
                matrix = self.matrices[name]
                matrix.widen_all(wide.view(matrix.shape))
                child._parameters[name] = _fixed(wide.view(shape))
            try:
                return child(*args, **kwargs)
            finally:
                for name in self._full:
                    child._parameters[name] = None

    def widened(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the original class with the same weights, in memory of its own."""
        wide = _without(self._child[0], self._full)
        for name, shape in self._full.items():
            weight = self.matrices[name].widened(dtype or self.dtype).view(shape)
            wide._parameters[name] = _fixed(weight)
        return wide


def is_packable(module: nn.Module) -> bool:
    """Whether a module can be packed. A linear layer with a single output (a gate) is left."""
    if isinstance(module, PackedModule):
        return False
    if isinstance(module, nn.Linear):
        return module.out_features > 1
    return _is_conv1d(module) or bool(raw_weights(module))


def raw_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own 3-D parameters (experts, out, in), by name."""
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if parameter.dim() == 3}


def matrices_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are packed, by name, as matrices (out, in)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"weight": module.weight}
    if _is_conv1d(module):
        return {"weight": cast("torch.Tensor", module.weight).T}
    return {name: value.flatten(0, 1) for name, value in raw_weights(module).items()}


def from_matrices(child: nn.Module, matrices: Mapping[str, PackedMatrix]) -> PackedModule:
    """The packed module for one that `is_packable` with given weights, such as those of a file.

    Of the child only the bias and the sizes are used, so its weights may be on the meta
    device.
    """
    if isinstance(child, nn.Linear) or _is_conv1d(child):
        dtype = cast("torch.Tensor", child.weight).dtype
        bias = cast("nn.Parameter | None", child.bias)
        return PackedLinear(matrices["weight"], bias, dtype).eval()
    if isinstance(child, nn.Embedding):
        scale = cast("torch.Tensor | None", getattr(child, "embed_scale", None))
        return PackedEmbedding(matrices["weight"], child.weight.dtype, scale).eval()
    return PackedExperts(child, matrices).eval()


def from_tensors(
    child: nn.Module, level: PackedLevel, tensors: Mapping[str, torch.Tensor]
) -> PackedModule:
    """The packed module for such a module from the `PackedModule.tensors` of another."""
    matrices = {}
    for name, weight in matrices_of(child).items():
        shape = (weight.shape[0], weight.shape[1])
        own = {
            part: tensors[f"{name}_{part}"]
            for part in tensor_shapes(level, shape)
            if f"{name}_{part}" in tensors
        }
        matrices[name] = matrix_from_tensors(level, shape, own)
    return from_matrices(child, matrices)


def skeleton(module: nn.Module) -> nn.Module:
    """A child for `from_tensors` without weights of its own: they are on the meta device.

    Args:
        module: A module that can be packed, or a packed module, whose unquantised shape is then
            meant.
    """
    if isinstance(module, PackedLinear):
        size = (module.in_features, module.out_features)
        linear = nn.Linear(*size, bias=False, device="meta", dtype=module.dtype)
        linear.register_parameter("bias", module.bias)
        return linear
    if isinstance(module, PackedEmbedding):
        rows = meta_embedding(module.num_embeddings, module.embedding_dim, module.dtype)
        rows.register_buffer("embed_scale", module.embed_scale, persistent=False)
        return rows
    if isinstance(module, PackedExperts):
        full, child, dtype = module._full, module._child[0], module.dtype
    else:
        child, names = module, list(raw_weights(module)) or ["weight"]
        weights = {name: cast("torch.Tensor", getattr(module, name)) for name in names}
        full = {name: tuple(weight.shape) for name, weight in weights.items()}
        dtype = next(iter(weights.values())).dtype
    bare = _without(child, full)
    for name, shape in full.items():
        bare._parameters[name] = _fixed(torch.empty(shape, dtype=dtype, device="meta"))
    return bare


def meta_embedding(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """Embeddings on the meta device, (rows, width).

    The constructor would fill them with random numbers, for which torch imports its compiler
    (70 MiB of memory) on that device.
    """
    weight = torch.empty((rows, width), dtype=dtype, device="meta")
    return nn.Embedding(rows, width, _weight=weight, _freeze=True)


def module_widen_bytes(child: nn.Module) -> int:
    """Bytes of the shared buffer that a child's packed module needs, from its sizes alone."""
    if isinstance(child, nn.Embedding):
        return 0
    matrices = matrices_of(child)
    if weights := raw_weights(child):
        return sum(weight.numel() * weight.element_size() for weight in weights.values())
    shapes = ((matrix, (matrix.shape[0], matrix.shape[1])) for matrix in matrices.values())
    return max(piece_rows(s) * s[1] * matrix.element_size() for matrix, s in shapes)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _fixed(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _without(child: nn.Module, names: Mapping[str, Any]) -> nn.Module:
    shell = copy.copy(child)
    shell._parameters = {**child._parameters, **dict.fromkeys(names)}
    return shell

"""GPTQ: a quantiser that keeps the outputs of a layer.

For inputs x of a linear layer, the squared error of its outputs under a change D of its weights is
``trace(D H D.T)`` with the Hessian ``H = x.T x``. GPTQ (Frantar et al. 2023) rounds one input after
the other and lets the weights of later inputs compensate for each error. Here each group of inputs
gets its scale and zero when its turn comes, from the compensated weights. Then codes and scales are
improved in turn: each scale and zero by least squares under H, and each code by coordinate descent
(as in QuantEase, Behdin et al. 2023). A layer behind quantised ones can make up for their errors
(`correction`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from rap_env.models.weights.packed_layout import PackedLevel, stored_level
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import Grid, searched

_ROWS = 4096  # of a matrix that are quantised at a time, to bound temporary memory

DAMPING = 0.01
"""Part of a Hessian's mean diagonal that is added to its diagonal, by default."""


@contextlib.contextmanager
def hessians(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum ``x.T x`` of the inputs of linear layers, (in, in), float32, while a model runs.

    Layers that are called with the same tensor one after the other, as the projections of queries,
    keys and values are, share one sum. Run the calibration text in the ``with`` block.

    Args:
        layers: The layers by any names.

    Yields:
        The sums so far, by the names of the layers that were called.
    """
    sums: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor, str] | None = None

    def add(name: str, _layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        states = args[0]
        if last is not None and last[0] is states:
            sums[name] = sums[last[1]]
            return
        last = states, name
        flat = states.detach().reshape(-1, states.shape[-1]).float()
        if name in sums:
            sums[name].addmm_(flat.T, flat)
        else:
            sums[name] = flat.T @ flat

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
        yield sums


@contextlib.contextmanager
def recorded_inputs(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the inputs of each call of a linear layer in a ``with`` block, (tokens, in) each."""
    inputs: list[torch.Tensor] = []

    def keep(_layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].detach().flatten(0, -2))

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        hook.remove()


def correction(
    native: Sequence[torch.Tensor], changed: Sequence[torch.Tensor], damping: float
) -> torch.Tensor:
    """What to multiply a layer's weights by where the layers before it are quantised, (in, in).

    For the changed inputs y of the same tokens, ``W C`` has outputs that are nearest to those of W
    for the native inputs x: by least squares, with ``H = y.T y``, ``C = I + (x - y).T y / H``
    (as in GPTAQ, Li et al. 2025, arXiv 2504.02692).

    Args:
        native: Parts of the native inputs, (tokens, in) each.
        changed: The same parts of the changed ones.
        damping: As of `DampedHessian`: more of it keeps C nearer to I.
    """
    size = native[0].shape[1]
    hessian, cross = (torch.zeros(size, size, device=native[0].device) for _ in range(2))
    for before, after in zip(native, changed, strict=True):
        wide = after.float()
        hessian.addmm_(wide.T, wide)
        cross.addmm_((before.float() - wide).T, wide)
    factor = DampedHessian.of(hessian, damping).factor
    moved = cross @ factor.T @ factor
    moved.diagonal().add_(1)
    return moved


@dataclass(frozen=True)
class DampedHessian:
    """A Hessian that can be inverted.

    Attributes:
        matrix: (in, in).
        factor: Upper Cholesky factor of its inverse, (in, in).
    """

    matrix: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float = DAMPING) -> DampedHessian:
        """Damp the sum of ``x.T x`` over calibration inputs, (in, in).

        Args:
            hessian: The sum.
            damping: Part of its mean diagonal that is added to its diagonal. More of it trusts the
                text less: it is better where text of another kind is served.
        """
        matrix = hessian.float().clone()
        diagonal = matrix.diagonal()
        diagonal += damping * diagonal.mean() + torch.finfo(torch.float32).tiny
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix.double()))
        return cls(matrix, torch.linalg.cholesky(inverse, upper=True).float())


def quantise_gptq(
    weight: torch.Tensor,
    level: PackedLevel,
    hessian: DampedHessian,
    corrected_by: torch.Tensor | None = None,
) -> PackedMatrix:
    """Pack a matrix with a small squared error of its outputs.

    Args:
        weight: (out, in).
        level: A packed level below int8.
        hessian: Of the layer's inputs, on the same device.
        corrected_by: A `correction`, (in, in).
    """
    if corrected_by is not None:
        weight = weight.detach().float() @ corrected_by
    if len(weight) > _ROWS:
        parts = torch.split(weight, _ROWS)
        matrices = [quantise_gptq(part, level, hessian) for part in parts]
        return matrices[0].joined(matrices)
    weight = weight.detach().float()
    grid = Grid.of(stored_level(level, (weight.shape[0], weight.shape[1])), weight)
    coded = _compensated(grid, weight, hessian.factor)
    # Once: small layers gain from it; more often did not lower the loss of Gemma 3 270M.
    coded = coded.with_better_scales(weight, hessian.matrix)
    coded = coded.with_better_codes(weight, hessian.matrix)
    return grid.matrix(coded.codes, coded.scale, coded.zero)


def _compensated(grid: Grid, weight: torch.Tensor, factor: torch.Tensor) -> _Coded:
    """GPTQ."""
    left = weight.clone()  # compensated for the errors so far
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for first in range(0, weight.shape[1], grid.group_inputs):
        group = slice(first, first + grid.group_inputs)
        own, block = left[:, group], factor[group, group]
        scale, zero = searched(grid, own, block.diagonal().square().reciprocal())
        errors = torch.empty_like(own)
        for column in range(own.shape[1]):
            value = own[:, column]
            code = grid.centred_codes(value[:, None], scale, zero)[:, 0]
            codes[:, first + column] = code
            error = (value - (code * scale + zero)) / block[column, column]
            errors[:, column] = error
            own[:, column + 1 :].addr_(error, block[column, column + 1 :], alpha=-1)
        left[:, group.stop :].addmm_(errors, factor[group, group.stop :], alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return _Coded(grid, codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


@dataclass(frozen=True)
class _Coded:
    """A quantised matrix: centred codes, (out, in), scales and zeros, (out, groups)."""

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """Its weights, (out, in)."""
        inputs, size = self.codes.shape[1], self.grid.group_inputs
        scale, zero = (
            part.repeat_interleave(size, dim=1)[:, :inputs] for part in (self.scale, self.zero)
        )
        return torch.addcmul(zero, self.codes, scale)

    def with_better_scales(self, weight: torch.Tensor, hessian: torch.Tensor) -> _Coded:
        """Scales and zeros by least squares under the Hessian, one group after the other."""
        grid, codes, scale, zero = self.grid, self.codes, self.scale.clone(), self.zero.clone()
        pull = (weight - self.values) @ hessian  # (out, in)
        for index in range(scale.shape[1]):
            group = slice(index * grid.group_inputs, (index + 1) * grid.group_inputs)
            own, centred = hessian[group, group], codes[:, group]
            weighted = centred @ own
            both, alone = (weighted * centred).sum(dim=1), own.sum()
            cross = weighted.sum(dim=1)
            by_code, by_one = (pull[:, group] * centred).sum(dim=1), pull[:, group].sum(dim=1)
            determinant = both * alone - cross.square()
            safe = determinant > 1e-6 * both * alone
            inverse = torch.where(safe, determinant, 1.0).reciprocal() * safe
            new_scale, new_zero = grid.rounded(
                scale[:, index] + (alone * by_code - cross * by_one) * inverse,
                zero[:, index] + (both * by_one - cross * by_code) * inverse,
            )
            change = torch.outer(new_zero - zero[:, index], own.new_ones(own.shape[0]))
            change += (new_scale - scale[:, index])[:, None] * centred
            scale[:, index], zero[:, index] = new_scale, new_zero
            pull.addmm_(change, hessian[group], alpha=-1)
        return replace(self, scale=scale, zero=zero)

    def with_better_codes(self, weight: torch.Tensor, hessian: torch.Tensor) -> _Coded:
        """Each code by coordinate descent."""
        grid, codes, scale, zero = self.grid, self.codes.clone(), self.scale, self.zero
        values = self.values
        pull = (weight - values) @ hessian
        for index in range(scale.shape[1]):
            first = index * grid.group_inputs
            group = slice(first, first + grid.group_inputs)
            own = hessian[group, group]
            steps, zeros = scale[:, index], zero[:, index]
            near = pull[:, group].clone()
            changes = torch.zeros_like(near)
            for column in range(near.shape[1]):
                wanted = values[:, first + column] + near[:, column] / own[column, column]
                code = grid.centred_codes(wanted[:, None], steps, zeros)[:, 0]
                change = (code - codes[:, first + column]) * steps
                codes[:, first + column], changes[:, column] = code, change
                near.addr_(change, own[column], alpha=-1)
            pull.addmm_(changes, hessian[group], alpha=-1)
        return replace(self, codes=codes)

"""GPTQ: a quantiser that keeps the outputs of a layer.

For inputs x of a linear layer, the squared error of its outputs under a change D of its
weights is ``trace(D H D.T)`` with the Hessian ``H = x.T x``. GPTQ (Frantar et al. 2023)
rounds one input after the other and lets the weights of later inputs compensate for each
error. Here each group of inputs gets its scale and zero when its turn comes, from the
compensated weights. Then codes and scales are improved in turn: each scale and zero by least
squares under H, and each code by coordinate descent (as in QuantEase, Behdin et al. 2023). A
layer behind quantised ones can make up for their errors (`correction`).
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
from rap_env.models.weights.quantisers import CodedRows, Grid, concatenated, nonzero, searched

_ROWS = 4096  # of a matrix that are quantised at a time, to bound temporary memory
_PANEL = 256  # rows of a symmetric matrix that are computed at a time, from the diagonal on

DAMPING = 0.01
"""Part of a Hessian's mean diagonal that is added to its diagonal, by default."""


@contextlib.contextmanager
def hessians(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum ``x.T x`` of the inputs of linear layers, (in, in), float32, while a model runs.

    Layers that are called with the same tensor one after the other, as the projections of
    queries, keys and values are, share one sum. Run the calibration text in the ``with``
    block.

    Args:
        layers: The layers by any names.

    Yields:
        The sums, complete after the block, by the names of the layers that were called.
    """
    sums: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor, str] | None = None

    def add(name: str, _layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        states = args[0]
        if last is not None and last[0] is states:
            sums[name] = sums[last[1]]
            return
        last, size = (states, name), states.shape[-1]
        if name not in sums:
            sums[name] = torch.zeros(size, size, device=states.device)
        for sequence in _sequences(states):
            _add_upper(sums[name], sequence.float())

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
        yield sums
    whole = {id(total): _mirrored(total) for total in sums.values()}
    sums.update({name: whole[id(total)] for name, total in sums.items()})


def _sequences(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States of a batch, (..., tokens, in), one sequence after the other, (tokens, in) each."""
    return states.detach().reshape(-1, *states.shape[-2:]).unbind()


def _add_upper(total: torch.Tensor, states: torch.Tensor) -> None:
    """Add ``states.T @ states``, without most of what is below the diagonal; see `_mirrored`."""
    for first in range(0, len(total), _PANEL):
        panel = states[:, first : first + _PANEL]
        total[first : first + _PANEL, first:].addmm_(panel.T, states[:, first:])


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix by what is on and above its diagonal."""
    return total.triu() + total.triu(1).T


@contextlib.contextmanager
def recorded_inputs(layer: nn.Module, every: int = 1) -> Iterator[list[torch.Tensor]]:
    """Keep inputs of a linear layer in a ``with`` block, (tokens, in) for each sequence.

    Args:
        layer: The layer.
        every: Of the sequences of each call, the first one and every so many are kept.
    """
    inputs: list[torch.Tensor] = []

    def keep(_layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.extend(sequence.clone() for sequence in _sequences(args[0])[::every])

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        hook.remove()


def correction(
    native: Sequence[torch.Tensor], changed: Sequence[torch.Tensor], damping: float
) -> torch.Tensor:
    """What to multiply a layer's weights by where the layers before it are quantised, (in, in).

    For the changed inputs y of the same tokens, ``W C`` has outputs that are nearest to those
    of W for the native inputs x: by least squares, with ``H = y.T y``, ``C = I + (x - y).T y
    / H`` (as in GPTAQ, Li et al. 2025, arXiv 2504.02692).

    Args:
        native: Parts of the native inputs, (tokens, in) each.
        changed: The same parts of the changed ones.
        damping: As of `DampedHessian`: more of it keeps C nearer to I.
    """
    size = native[0].shape[1]
    hessian, cross = (torch.zeros(size, size, device=native[0].device) for _ in range(2))
    for before, after in zip(native, changed, strict=True):
        wide = after.float()
        _add_upper(hessian, wide)
        cross.addmm_((before.float() - wide).T, wide)
    factor = DampedHessian.of(_mirrored(hessian), damping).factor
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
            damping: Part of its mean diagonal that is added to its diagonal. More of it
                trusts the text less: it is better where text of another kind is served.
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
    weight = weight.detach()
    level = stored_level(level, (weight.shape[0], weight.shape[1]))
    parts = []
    for rows in map(torch.Tensor.float, torch.split(weight, _ROWS)):
        coded = _compensated(Grid.of(level, rows), rows, hessian.factor)
        # Once: small layers gain from it; more often did not lower the loss of Gemma 3 270M.
        coded = _with_better_scales(coded, rows, hessian.matrix)
        coded = _with_better_codes(coded, rows, hessian.matrix)
        # A quarter of the bytes.
        parts.append(replace(coded, codes=coded.codes.to(torch.int8)))
    return concatenated(parts)


def _compensated(grid: Grid, weight: torch.Tensor, factor: torch.Tensor) -> CodedRows:
    """GPTQ."""
    left = weight.clone()  # compensated for the errors so far
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for first in range(0, weight.shape[1], grid.group_inputs):
        group = slice(first, first + grid.group_inputs)
        own, block = left[:, group].contiguous(), factor[group, group]
        scale, zero = searched(grid, own, block.diagonal().square().reciprocal())
        steps = nonzero(scale)
        chosen, errors = torch.empty(2, *own.T.shape, device=own.device)
        for column, pivot in enumerate(block.diagonal().tolist()):
            value, code, error = own[:, column].contiguous(), chosen[column], errors[column]
            grid.nearest_(torch.sub(value, zero, out=code).div_(steps))
            torch.sub(value, (code * scale).add_(zero), out=error).div_(pivot)
            own[:, column + 1 :].addr_(error, block[column, column + 1 :], alpha=-1)
        codes[:, group] = chosen.T
        left[:, group.stop :].addmm_(errors.T, factor[group, group.stop :], alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return CodedRows(grid, codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


def _values(coded: CodedRows) -> torch.Tensor:
    """The weights of quantised rows, (rows, in)."""
    inputs, size = coded.codes.shape[1], coded.grid.group_inputs
    scale, zero = (
        part.repeat_interleave(size, dim=1)[:, :inputs] for part in (coded.scale, coded.zero)
    )
    return torch.addcmul(zero, coded.codes, scale)


def _with_better_scales(coded: CodedRows, weight: torch.Tensor, hessian: torch.Tensor) -> CodedRows:
    """Scales and zeros by least squares under the Hessian, one group after the other."""
    grid, codes, scale, zero = coded.grid, coded.codes, coded.scale.clone(), coded.zero.clone()
    pull = (weight - _values(coded)) @ hessian  # (out, in)
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
    return replace(coded, scale=scale, zero=zero)


def _with_better_codes(coded: CodedRows, weight: torch.Tensor, hessian: torch.Tensor) -> CodedRows:
    """Each code by coordinate descent."""
    grid, codes, values = coded.grid, coded.codes.clone(), _values(coded)
    pull = (weight - values) @ hessian
    for index in range(coded.scale.shape[1]):
        first = index * grid.group_inputs
        group = slice(first, first + grid.group_inputs)
        own, scale, zero = hessian[group, group], coded.scale[:, index], coded.zero[:, index]
        steps = nonzero(scale)
        # One row for each input, so that what a step reads and writes is contiguous.
        near, before, wide = (part[:, group].T.contiguous() for part in (pull, codes, values))
        chosen, changes = torch.empty_like(near), torch.empty_like(near)
        for column, pivot in enumerate(own.diagonal().tolist()):
            code, change, later = chosen[column], changes[column], slice(column + 1, None)
            torch.div(near[column], pivot, out=code).add_(wide[column])
            grid.nearest_(code.sub_(zero).div_(steps))
            torch.sub(code, before[column], out=change).mul_(scale)
            near[later].addr_(own[column, later], change, alpha=-1)
        codes[:, group] = chosen.T
        pull.addmm_(changes.T, hessian[group], alpha=-1)
    return replace(coded, codes=codes)

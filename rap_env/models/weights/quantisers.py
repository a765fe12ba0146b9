"""Quantisers: they choose the codes and scales of packed matrices.

At int4 the weights of a group of 32 inputs are ``(code - 8) * scale + zero`` with codes 0 to 15.

- **By the weights** (`quantise`). Ranges of several widths around the weights are tried. From each
  one codes and, by least squares, scale and zero are fitted in turn, and the best pair is kept, as
  in llama.cpp's 4-bit types. The range from the least to the greatest weight is among them, so
  weights on a grid of 16 steps keep their values.
- **By a layer's outputs** (`quantise_gptq`). For inputs x of a linear layer, the squared error of
  its outputs under a change D of its weights is ``trace(D H D.T)`` with the Hessian ``H = x.T x``.
  GPTQ (Frantar et al. 2023) rounds one input after the other and lets the weights of later inputs
  compensate for each error. Here each group of 32 inputs gets its scale and zero when its turn
  comes, from the compensated weights. Then codes and scales are improved in turn: each scale and
  zero by least squares under H, and each code by coordinate descent (as in QuantEase, Behdin et al.
  2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from rap_env.errors import check_name
from rap_env.models.weights.packed_layout import (
    GROUP_INPUTS,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    fills_blocks,
)
from rap_env.models.weights.packing import PackedMatrix

Quantiser = Callable[[torch.Tensor, PackedLevel], PackedMatrix]
"""Packs a matrix (out, in) at a level."""

_LARGEST = 15  # int4 code
_STEPS = (15.0, 14.0, 13.0, 16.5, 18.0)  # widths of ranges, in units of their 16 steps
_REFITS = 2
_EXACT = 2.0**-18  # squared error of weights on a grid whose scales were rounded
_ROWS = 256  # of a matrix that are quantised at a time, to bound temporary memory


def quantise(weight: torch.Tensor, level: PackedLevel) -> PackedMatrix:
    """Pack a matrix with the least squared error of its weights.

    Args:
        weight: (out, in), floating-point.
        level: ``"int8"`` or ``"int4"``.
    """
    check_name("level of packed weights", level, PACKED_LEVELS)
    weight = weight.detach()
    if level == "int8":
        return _quantise_int8(weight)
    return _int4(weight, searched)


def requantise(matrix: PackedMatrix, level: PackedLevel) -> PackedMatrix:
    """As `quantise`, from packed weights; only a few rows of them are widened at a time."""
    rows, inputs = matrix.shape
    step = _ROWS if fills_blocks(matrix.shape) else max(1, rows)
    parts = []
    for first in range(0, rows, step):
        wide = torch.empty(min(step, rows - first), inputs, device=matrix.device)
        matrix.widen(wide, first)
        parts.append(quantise(wide, level))
    return PackedMatrix.joined(parts)


def round_to_nearest(weight: torch.Tensor) -> PackedMatrix:
    """Pack a matrix at int4 with scales from the least and greatest weight; for comparisons."""
    return _int4(weight.detach(), _whole_range)


def _quantise_int8(weight: torch.Tensor) -> PackedMatrix:
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).to(SCALE_DTYPE)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = (weight / safe[:, None]).round_().clamp_(-127, 127)
    return PackedMatrix.from_codes(codes.to(torch.int8), scale)


_Fit = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _int4(weight: torch.Tensor, fit: _Fit) -> PackedMatrix:
    codes, scales, zeros = [], [], []
    inputs = weight.shape[1]
    counted = functional.pad(torch.ones(inputs), (0, -inputs % GROUP_INPUTS))
    counted = counted.view(-1, GROUP_INPUTS).to(weight.device)
    for piece in torch.split(weight, _ROWS):
        groups = grouped(piece.float())
        scale, zero = fit(groups, counted)
        codes.append(centred_codes(groups, scale, zero).flatten(1)[:, :inputs] + 8)
        scales.append(scale)
        zeros.append(zero)
    return PackedMatrix.from_codes(torch.cat(codes), torch.cat(scales), zero=torch.cat(zeros))


def grouped(weight: torch.Tensor) -> torch.Tensor:
    """(rows, in) to (rows, groups, 32); a shorter last group repeats its last input."""
    rows, inputs = weight.shape
    if missing := -inputs % GROUP_INPUTS:
        weight = functional.pad(weight[None], (0, missing), mode="replicate")[0]
    return weight.view(rows, -1, GROUP_INPUTS)


def centred_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes minus 8, (..., 32), as floats; zero is the weight of code 8."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((groups - zero[..., None]) / safe[..., None]).round_().clamp_(-8, _LARGEST - 8)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Values as a packed matrix stores them."""
    return values.to(SCALE_DTYPE).float()


def _whole_range(
    groups: torch.Tensor, _: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = groups.aminmax(dim=-1)
    scale = (high - low) / _LARGEST
    return rounded(scale), rounded(low + 8 * scale)


def searched(
    groups: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group with the least squared error that the search finds.

    Args:
        groups: (..., 32) weights.
        importance: Factors of the squared errors, of a shape that broadcasts to that of `groups`.

    Returns:
        Scale and zero, (...), as a packed matrix stores them; zero is the weight of code 8.
    """
    share = torch.ones_like(groups) if importance is None else importance.expand(groups.shape)
    share = share / share.sum(dim=-1, keepdim=True)
    low, high = groups.aminmax(dim=-1)
    best_scale, best_zero = _whole_range(groups)
    least = torch.full_like(low, torch.inf)
    exact = _EXACT * groups.square().mul_(share).sum(dim=-1)
    for steps in _STEPS:
        scale = (high - low) / steps
        zero = low + 8 * scale if steps <= _LARGEST else (low + high + scale) / 2
        for _ in range(_REFITS + 1):
            scale, zero = rounded(scale), rounded(zero)
            codes = centred_codes(groups, scale, zero)
            values = torch.addcmul(zero[..., None], codes, scale[..., None])
            error = values.sub_(groups).square_().mul_(share).sum(dim=-1)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            scale, zero = _fitted(groups, codes, scale, share)
        if bool((least <= exact).all()):
            break
    return best_scale, best_zero


def _fitted(
    groups: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero with the least squared error for given codes; `scale` if all are equal."""
    mean_code, mean = (codes * share).sum(dim=-1), (groups * share).sum(dim=-1)
    centred = codes - mean_code[..., None]
    spread = (centred * share).mul_(centred).sum(dim=-1)
    slope = centred.mul_(groups).mul_(share).sum(dim=-1) / spread.clamp_min(1e-12)
    slope = torch.where(spread > 0, slope, scale)
    return slope, mean - mean_code * slope


_DAMPING = 0.01  # part of the Hessian's mean diagonal that is added to its diagonal


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


def quantise_gptq(weight: torch.Tensor, hessian: torch.Tensor) -> PackedMatrix:
    """Pack a matrix at int4 with a small squared error of its outputs.

    Args:
        weight: (out, in).
        hessian: Sum of ``x.T x`` over calibration inputs, (in, in), on the same device.
    """
    weight = weight.detach().float()
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += _DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    codes, scale, zero = _compensated(weight, hessian)
    # Once: small layers gain from it; more often did not lower the loss of Gemma 3 270M.
    scale, zero = _refitted(weight, hessian, codes, scale, zero)
    codes = _improved(weight, hessian, codes, scale, zero)
    return PackedMatrix.from_codes(codes + 8, scale, zero=zero)


def _compensated(
    weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GPTQ: codes minus 8, (out, in), scales and zeros (out, groups)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.clone()  # compensated for the errors so far
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for first in range(0, weight.shape[1], GROUP_INPUTS):
        group = slice(first, first + GROUP_INPUTS)
        own, block = left[:, group], factor[group, group]
        scale, zero = searched(own, block.diagonal().square().reciprocal())
        errors = torch.empty_like(own)
        for column in range(own.shape[1]):
            value = own[:, column]
            code = centred_codes(value[:, None], scale, zero)[:, 0]
            codes[:, first + column] = code
            error = (value - (code * scale + zero)) / block[column, column]
            errors[:, column] = error
            own[:, column + 1 :].addr_(error, block[column, column + 1 :], alpha=-1)
        left[:, group.stop :].addmm_(errors, factor[group, group.stop :], alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def _values(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    inputs = codes.shape[1]
    scale, zero = (p.repeat_interleave(GROUP_INPUTS, dim=1)[:, :inputs] for p in (scale, zero))
    return torch.addcmul(zero, codes, scale)


def _refitted(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros by least squares under the Hessian, one group after the other."""
    scale, zero = scale.clone(), zero.clone()
    pull = (weight - _values(codes, scale, zero)) @ hessian  # (out, in)
    for index in range(scale.shape[1]):
        group = slice(index * GROUP_INPUTS, (index + 1) * GROUP_INPUTS)
        own, centred = hessian[group, group], codes[:, group]
        weighted = centred @ own
        both, alone = (weighted * centred).sum(dim=1), own.sum()
        cross = weighted.sum(dim=1)
        by_code, by_one = (pull[:, group] * centred).sum(dim=1), pull[:, group].sum(dim=1)
        determinant = both * alone - cross.square()
        safe = determinant > 1e-6 * both * alone
        inverse = torch.where(safe, determinant, 1.0).reciprocal() * safe
        new_scale = rounded(scale[:, index] + (alone * by_code - cross * by_one) * inverse)
        new_zero = rounded(zero[:, index] + (both * by_one - cross * by_code) * inverse)
        change = torch.outer(new_zero - zero[:, index], own.new_ones(own.shape[0]))
        change += (new_scale - scale[:, index])[:, None] * centred
        scale[:, index], zero[:, index] = new_scale, new_zero
        pull.addmm_(change, hessian[group], alpha=-1)
    return scale, zero


def _improved(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> torch.Tensor:
    codes, values = codes.clone(), _values(codes, scale, zero)
    pull = (weight - values) @ hessian
    for first in range(0, weight.shape[1], GROUP_INPUTS):
        group = slice(first, first + GROUP_INPUTS)
        own = hessian[group, group]
        steps, zeros = scale[:, first // GROUP_INPUTS], zero[:, first // GROUP_INPUTS]
        near = pull[:, group].clone()
        changes = torch.zeros_like(near)
        for column in range(near.shape[1]):
            wanted = values[:, first + column] + near[:, column] / own[column, column]
            code = centred_codes(wanted[:, None], steps, zeros)[:, 0]
            change = (code - codes[:, first + column]) * steps
            codes[:, first + column], changes[:, column] = code, change
            near.addr_(change, own[column], alpha=-1)
        pull.addmm_(changes, hessian[group], alpha=-1)
    return codes

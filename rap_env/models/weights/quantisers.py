"""Quantisers: they choose the codes and scales of packed matrices.

At int4 the weights of a group of 32 inputs are ``(code - 8) * scale + zero`` with codes 0 to 15.
Ranges of several widths around the weights are tried. From each one codes and, by least squares,
scale and zero are fitted in turn, and the best pair is kept, as in llama.cpp's 4-bit types. The
range from the least to the greatest weight is among them, so weights on a grid of 16 steps keep
their values. See `rap_env.models.weights.gptq` for a quantiser that knows the inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from rap_env.errors import check_name
from rap_env.models.weights.packing import (
    GROUP_INPUTS,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    PackedMatrix,
    fills_blocks,
)

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

    Raises:
        UnknownNameError: There is no such level.
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


def round_to_nearest(weight: torch.Tensor, level: PackedLevel) -> PackedMatrix:
    """Pack a matrix with scales from the least and the greatest weight; for comparisons."""
    check_name("level of packed weights", level, PACKED_LEVELS)
    weight = weight.detach()
    return _quantise_int8(weight) if level == "int8" else _int4(weight, _whole_range)


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
            found = torch.addcmul(zero[..., None], codes, scale[..., None])
            error = found.sub_(groups).square_().mul_(share).sum(dim=-1)
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

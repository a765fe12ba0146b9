"""Quantisers: they choose the codes and scales of packed matrices.

At int4 the weights of a group of 32 inputs are ``code * scale + minimum`` with codes 0 to 15. The
scales of several clip ranges are tried, each is fitted by least squares to the codes that it gives,
and the one with the least squared error is kept, as llama.cpp does for its 4-bit types. The
range from the least to the greatest weight is among them, and so are ranges on which a coarser
grid has as many steps as it needs, so weights that lie on a grid of 16 steps keep their values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from rap_env.errors import check_name
from rap_env.llm.packing import (
    GROUP_INPUTS,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    PackedMatrix,
)

Quantiser = Callable[[torch.Tensor, PackedLevel], PackedMatrix]
"""Packs a matrix (out, in) at a level."""

_LARGEST = 15  # int4 code
_STEPS = (15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 15.5, 16.0, 16.5, 17.0, 17.5, 18.0, 19.0)
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
        codes.append(int4_codes(groups, scale, zero).flatten(1)[:, :inputs])
        scales.append(scale)
        zeros.append(zero)
    return PackedMatrix.from_codes(torch.cat(codes), torch.cat(scales), zero=torch.cat(zeros))


def grouped(weight: torch.Tensor) -> torch.Tensor:
    """(rows, in) to (rows, groups, 32); a shorter last group repeats its last input."""
    rows, inputs = weight.shape
    if missing := -inputs % GROUP_INPUTS:
        weight = functional.pad(weight[None], (0, missing), mode="replicate")[0]
    return weight.view(rows, -1, GROUP_INPUTS)


def int4_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes, (rows, groups, 32), as uint8; zero is the weight of code 8."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((groups - zero[..., None]) / safe[..., None]).round_().add_(8)
    return codes.clamp_(0, _LARGEST).to(torch.uint8)


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
    least = _squared_error(groups, best_scale, best_zero, share)
    exact = _EXACT * groups.square().mul_(share).sum(dim=-1)
    for steps in _STEPS:
        if bool((least <= exact).all()):
            break
        scale = (high - low) / steps
        zero = low + 8 * scale
        if steps > _LARGEST:  # clip both ends
            zero = (low + high) / 2 + scale / 2
        for _ in range(_REFITS + 1):
            kept = rounded(scale), rounded(zero)
            error = _squared_error(groups, *kept, share)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, kept[0], best_scale)
            best_zero = torch.where(better, kept[1], best_zero)
            scale, zero = _fitted(groups, *kept, share)
    return best_scale, best_zero


def _squared_error(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    codes = int4_codes(groups, scale, zero)
    found = torch.addcmul(zero[..., None], codes.float() - 8, scale[..., None])
    return (found - groups).square_().mul_(share).sum(dim=-1)


def _fitted(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero with the least squared error for the codes that `scale` and `zero` give."""
    codes = int4_codes(groups, scale, zero).float() - 8
    mean_code, mean = (codes * share).sum(dim=-1), (groups * share).sum(dim=-1)
    centred = codes - mean_code[..., None]
    spread = centred.square().mul_(share).sum(dim=-1)
    slope = (centred * groups).mul_(share).sum(dim=-1) / spread.clamp_min(1e-12)
    slope = torch.where(spread > 0, slope, scale)
    return slope, mean - mean_code * slope

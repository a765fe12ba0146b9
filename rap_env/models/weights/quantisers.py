"""Quantisers by the weights alone: they choose the codes and scales of packed matrices.

At int4 the weights of a group of 32 inputs are ``(code - 8) * scale + zero`` with codes 0 to
15. `Grid` has what other levels differ in. Ranges of several widths around the weights are
tried. From each one codes and, by least squares, scale and zero are fitted in turn, and the
best pair is kept, as in llama.cpp's 4-bit types. The range from the least to the greatest
weight is among them, so weights on a grid of 16 steps keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from rap_env.errors import check_name
from rap_env.models.weights.low_bits import LowBitMatrix
from rap_env.models.weights.packed_layout import (
    GROUP_INPUTS,
    LOW_BIT_FORMATS,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    stored_level,
)
from rap_env.models.weights.packing import PackedMatrix

Quantiser = Callable[[torch.Tensor, PackedLevel], PackedMatrix]
"""Packs a matrix (out, in) at a level."""

_WIDTHS: dict[int, tuple[float, ...]] = {
    4: (15.0, 14.0, 13.0, 16.5, 18.0),
    3: (7.0, 6.5, 7.5, 8.0, 8.8, 9.8, 11.0),
    2: (3.0, 3.4, 3.9, 4.5, 5.3, 6.3),
}
"""Widths of the ranges that are tried, in the steps between codes, by bits of a code."""

_REFITS = 2
_EXACT = 2.0**-18  # squared error of weights on a grid whose scales were rounded
_ROWS = 256  # of a matrix that are quantised at a time, to bound temporary memory


@dataclass(frozen=True)
class Grid:
    """The weights that the codes of some rows can stand for.

    Attributes:
        level: The level.
        bits: Bits of a code.
        group_inputs: Inputs of a group.
        factors: Of each row, (rows,); None at int4, whose scales have none.
    """

    level: PackedLevel
    bits: int
    group_inputs: int
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, level: PackedLevel, weight: torch.Tensor) -> Grid:
        """The grid for rows (rows, in) at a level below int8."""
        if level not in LOW_BIT_FORMATS:
            return cls(level, 4, GROUP_INPUTS)
        form = LOW_BIT_FORMATS[level]
        low, high = grouped(weight, form.group_inputs).aminmax(dim=-1)
        return cls(level, form.bits, form.group_inputs, form.factors(low, high))

    @property
    def middle(self) -> int:
        """The code whose weight is the zero."""
        return int(2 ** (self.bits - 1))

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def rounded(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, (rows, ...), as a packed matrix stores them."""
        if self.factors is None:
            return scale.to(SCALE_DTYPE).float(), zero.to(SCALE_DTYPE).float()
        factors = self.factors.view(-1, *[1] * (scale.dim() - 1))
        return LOW_BIT_FORMATS[self.level].rounded(scale, zero, factors)

    def centred_codes(
        self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes minus the middle one, (..., n), as floats."""
        return self.nearest_((weights - zero[..., None]).div_(nonzero(scale)[..., None]))

    def nearest_(self, codes: torch.Tensor) -> torch.Tensor:
        """Round centred codes in place."""
        return codes.round_().clamp_(-self.middle, self.largest - self.middle)

    def matrix(
        self, centred: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> PackedMatrix:
        """Pack centred codes (out, in), scales and zeros (out, groups)."""
        codes = centred + self.middle
        if self.factors is None:
            return PackedMatrix.from_codes(codes, scale, zero=zero)
        return LowBitMatrix.pack(self.level, codes, scale, zero, self.factors)


@dataclass(frozen=True)
class CodedRows:
    """Quantised rows of a matrix.

    Attributes:
        grid: What their codes can stand for.
        codes: Centred codes, (rows, in).
        scale: Scales, (rows, groups).
        zero: Zeros, (rows, groups).
    """

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def concatenated(parts: Sequence[CodedRows]) -> PackedMatrix:
    """Pack the rows of several parts, one after the other."""
    grid = parts[0].grid
    if grid.factors is not None:
        factors = [part.grid.factors for part in parts if part.grid.factors is not None]
        grid = replace(grid, factors=torch.cat(factors))
    return grid.matrix(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero for part in parts]),
    )


def quantise(weight: torch.Tensor, level: PackedLevel) -> PackedMatrix:
    """Pack a matrix with the least squared error of its weights.

    Args:
        weight: (out, in), floating-point.
        level: A packed level; int4 takes its place for shapes that cannot have it.
    """
    check_name("level of packed weights", level, PACKED_LEVELS)
    weight = weight.detach()
    if level == "int8":
        return _quantise_int8(weight)
    level = stored_level(level, (weight.shape[0], weight.shape[1]))
    return _packed(torch.split(weight, _ROWS), level)


def _quantise_int8(weight: torch.Tensor) -> PackedMatrix:
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).to(SCALE_DTYPE)
    codes = (weight / nonzero(scale).float()[:, None]).round_().clamp_(-127, 127)
    return PackedMatrix.from_codes(codes.to(torch.int8), scale)


def _packed(parts: Iterable[torch.Tensor], level: PackedLevel) -> PackedMatrix:
    """Pack the rows of a matrix, some at a time, (rows, in) each."""
    coded = []
    for part in parts:
        rows, inputs = part.float(), part.shape[1]
        grid = Grid.of(level, rows)
        groups = grouped(rows, grid.group_inputs)
        counted = torch.ones(inputs, device=rows.device)
        counted = functional.pad(counted, (0, -inputs % grid.group_inputs))
        scale, zero = searched(grid, groups, counted.view(-1, grid.group_inputs))
        codes = grid.centred_codes(groups, scale, zero).flatten(1)[:, :inputs]
        coded.append(CodedRows(grid, codes.to(torch.int8), scale, zero))
    return concatenated(coded)


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: 1 in place of 0."""
    return torch.where(scale == 0, 1.0, scale)


def grouped(weight: torch.Tensor, group_inputs: int) -> torch.Tensor:
    """(rows, in) to (rows, groups, n); a shorter last group repeats its last input."""
    rows, inputs = weight.shape
    if missing := -inputs % group_inputs:
        weight = functional.pad(weight[None], (0, missing), mode="replicate")[0]
    return weight.view(rows, -1, group_inputs)


def searched(
    grid: Grid, groups: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group with the least squared error that the search finds.

    Args:
        grid: The weights that codes can stand for.
        groups: (rows, ..., n) weights.
        importance: Factors of the squared errors, of a shape that broadcasts to that of
            `groups`.

    Returns:
        Scale and zero, (rows, ...), as a packed matrix stores them; zero is the weight of the
        middle code.
    """
    share = importance.expand(groups.shape)
    share = share / share.sum(dim=-1, keepdim=True)
    low, high = groups.aminmax(dim=-1)
    whole = (high - low) / grid.largest
    best_scale, best_zero = grid.rounded(whole, low + grid.middle * whole)
    least = torch.full_like(low, torch.inf)
    exact = _EXACT * groups.square().mul_(share).sum(dim=-1)
    mean = (groups * share).sum(dim=-1)
    middle = grid.middle - grid.largest / 2
    for steps in _WIDTHS[grid.bits]:
        scale = (high - low) / steps
        ends = steps <= grid.largest  # the range begins at the least weight
        zero = low + grid.middle * scale if ends else (low + high) / 2 + middle * scale
        for refit in range(_REFITS + 1):
            scale, zero = grid.rounded(scale, zero)
            codes = grid.centred_codes(groups, scale, zero)
            # With both factors broadcast torch would compute one value at a time.
            values = zero[..., None].expand(codes.shape).contiguous()
            values.addcmul_(codes, scale[..., None])
            error = values.sub_(groups).square_().mul_(share).sum(dim=-1)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            if refit < _REFITS:
                scale, zero = _fitted(groups, mean, codes, scale, share)
        if bool((least <= exact).all()):
            break
    return best_scale, best_zero


def _fitted(
    groups: torch.Tensor,
    mean: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    share: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero with the least squared error for given codes; `scale` if all are equal."""
    mean_code = (codes * share).sum(dim=-1)
    centred = codes.sub_(mean_code[..., None])
    weighted = centred * share
    spread = (weighted * centred).sum(dim=-1)
    slope = centred.mul_(groups).mul_(share).sum(dim=-1) / spread.clamp_min(1e-12)
    slope = torch.where(spread > 0, slope, scale)
    return slope, mean - mean_code * slope

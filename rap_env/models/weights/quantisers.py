"""Quantisers by the weights alone: they choose the codes and scales of packed matrices.

At int4 the weights of a group of 32 inputs are ``(code - 8) * scale + zero`` with codes 0 to
15. `Grid` has what other levels differ in. Ranges of several widths around the weights are
tried. From each one codes and, by least squares, scale and zero are fitted in turn, and the
best pair is kept, as in llama.cpp's 4-bit types. The range from the least to the greatest
weight is among them, so weights on a grid of 16 steps keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rap_env.errors import UnknownNameError
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS, LowBitMatrix, stored_level
from rap_env.models.weights.packing import (
    GROUP_INPUTS,
    PACKED_LEVELS,
    SCALE_DTYPE,
    PackedLevel,
    PackedMatrix,
)

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
_ROWS = 128  # of a matrix that are quantised at a time, to bound temporary memory
_GROUPS = 16  # of so many rows that are searched at a time: what is tried stays in the CPU's cache


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
    def of(cls, level: PackedLevel, columns: torch.Tensor) -> Grid:
        """The grid for rows at a level below int8.

        Args:
            level: The level.
            columns: Their weights, (in, rows).
        """
        if level not in LOW_BIT_FORMATS:
            return cls(level, 4, GROUP_INPUTS)
        form = LOW_BIT_FORMATS[level]
        low, high = columns.view(-1, form.group_inputs, columns.shape[1]).aminmax(dim=1)
        return cls(level, form.bits, form.group_inputs, form.factors(low.T, high.T))

    @property
    def middle(self) -> int:
        """The code whose weight is the zero."""
        return int(2 ** (self.bits - 1))

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def rounded(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, (..., rows), as a packed matrix stores them."""
        if self.factors is None:
            return scale.to(SCALE_DTYPE).float(), zero.to(SCALE_DTYPE).float()
        return LOW_BIT_FORMATS[self.level].rounded(scale, zero, self.factors)

    def nearest_(self, codes: torch.Tensor) -> torch.Tensor:
        """Round centred codes in place."""
        return codes.round_().clamp_(-self.middle, self.largest - self.middle)


@dataclass(frozen=True)
class CodedRows:
    """Quantised rows of a matrix; what is of one row is in a column.

    Attributes:
        grid: What their codes can stand for.
        codes: Centred codes, (in, rows).
        scale: Scales, (groups, rows).
        zero: Zeros, (groups, rows).
    """

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def concatenated(parts: Sequence[CodedRows]) -> PackedMatrix:
    """Pack the rows of several parts, one after the other."""
    grid = parts[0].grid
    codes, scale, zero = (
        torch.cat([getattr(part, name).T for part in parts]) for name in ("codes", "scale", "zero")
    )
    codes = codes + grid.middle
    factors = [part.grid.factors for part in parts if part.grid.factors is not None]
    if not factors:
        return PackedMatrix.from_codes(codes, scale, zero=zero)
    return LowBitMatrix.pack(grid.level, codes, scale, zero, torch.cat(factors))


def quantise(
    weight: torch.Tensor, level: PackedLevel, importance: torch.Tensor | None = None
) -> PackedMatrix:
    """Pack a matrix with the least squared error of its weights.

    Args:
        weight: (out, in), floating-point.
        level: A packed level; int4 takes its place for shapes that cannot have it.
        importance: Factors of the squared errors of each input's weights, (in,), positive, such
            as the mean square of the input; None for equal ones. Not used at int8.
    """
    if level not in PACKED_LEVELS:
        raise UnknownNameError("level of packed weights", level, PACKED_LEVELS)
    weight = weight.detach()
    if level == "int8":
        weight = weight.float()
        scale = (weight.abs().amax(dim=1) / 127).to(SCALE_DTYPE)
        whole = (weight / nonzero(scale).float()[:, None]).round_().clamp_(-127, 127)
        return PackedMatrix.from_codes(whole.to(torch.int8), scale)
    level, coded = stored_level(level, (weight.shape[0], weight.shape[1])), []
    for part in torch.split(weight, _ROWS):
        columns = part.float().T.contiguous()
        grid, codes, scales, zeros = Grid.of(level, columns), [], [], []
        for groups, factors in _grouped(columns, grid.group_inputs, importance):
            scale, zero = searched(grid, groups, factors)
            own = (groups - zero[:, None]).div_(nonzero(scale)[:, None])
            codes.append(grid.nearest_(own).flatten(0, 1).to(torch.int8))
            scales.append(scale)
            zeros.append(zero)
        coded.append(CodedRows(grid, *map(torch.cat, (codes, scales, zeros))))
    return concatenated(coded)


def _grouped(
    columns: torch.Tensor, size: int, importance: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Groups of inputs, (groups, n, rows), with their importance, (groups, n) or (n,)."""
    whole = max(size, len(columns) // size * size)
    for first in range(0, len(columns), whole):  # the last group may be short
        some = columns[first : first + whole]
        groups = some.view(-1, min(size, len(some)), some.shape[1])
        parts = torch.split(groups, _GROUPS)
        if importance is None:
            alike = groups.new_ones(groups.shape[1])
            yield from ((part, alike) for part in parts)
            continue
        factors = importance[first : first + whole].view(groups.shape[:2])
        yield from zip(parts, torch.split(factors, _GROUPS), strict=True)


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: 1 in place of 0."""
    return torch.where(scale == 0, 1.0, scale)


def searched(
    grid: Grid, groups: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of groups of inputs with the least squared error that the search finds.

    All widths are tried at once. Errors and fits follow from a few sums over a group's codes:
    their mean, their mean square, and their mean product with the weights.

    Args:
        grid: The weights that codes can stand for.
        groups: Weights, (groups, n, rows).
        importance: Factors of the squared errors, (n,), or of each group (groups, n).

    Returns:
        Scale and zero, (groups, rows), as a packed matrix stores them; zero is the weight of
        the middle code.
    """
    share = importance / importance.sum(dim=-1, keepdim=True)
    mean = _shared_sum(share, groups)
    weights = groups - mean[:, None]  # so that little is lost where sums cancel
    shared = weights * share[..., None]
    square = (shared * weights).sum(dim=1)
    low, high = weights.amin(dim=1), weights.amax(dim=1)  # `aminmax` takes ten times as long
    steps = torch.tensor(_WIDTHS[grid.bits], device=groups.device)[:, None, None]
    scale = (high - low) / steps  # (widths, groups, rows)
    centre = (low + high) / 2 + (grid.middle - grid.largest / 2) * scale
    # A range of no more steps than there are begins at the least weight.
    zero = torch.where(steps <= grid.largest, low + grid.middle * scale, centre)
    tried = []
    codes, products = (weights.new_empty(len(steps), *weights.shape) for _ in range(2))
    for _ in range(_REFITS + 1):
        scale, stored = grid.rounded(scale, zero + mean)
        zero = stored - mean
        inverse = nonzero(scale).reciprocal()
        torch.addcmul((-zero * inverse)[:, :, None], weights, inverse[:, :, None], out=codes)
        grid.nearest_(codes)  # (widths, groups, n, rows)
        product = torch.mul(codes, shared, out=products).sum(dim=2)
        mean_code = _shared_sum(share, codes)
        mean_square = _shared_sum(share, codes.square_())
        cross = 2 * (zero * mean_code - product)
        error = square + zero.square() + scale * (scale * mean_square + cross)
        if bool((error[0] <= _EXACT * (square + mean.square())).all()):
            return scale[0], stored[0]
        tried.append((scale, stored, error))
        spread = mean_square - mean_code.square()
        slope = product / spread.clamp_min(1e-12)
        scale = torch.where(spread > 1e-6 * mean_square, slope, scale)
        zero = -mean_code * scale
    scales, zeros, errors = (torch.cat(parts).flatten(1) for parts in zip(*tried, strict=True))
    best = errors.T.contiguous().argmin(dim=1)[None]
    return scales.gather(0, best).view(low.shape), zeros.gather(0, best).view(low.shape)


def _shared_sum(share: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted sums over inputs, (..., n, rows) to (..., rows), with shares (n,) or (groups, n)."""
    return share @ values if share.dim() == 1 else (share[:, None] @ values).squeeze(-2)

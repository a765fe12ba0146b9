"""Quantisers keep weights on a grid, and never lose to rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.models.weights.packed_layout import PACKED_LEVELS
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import quantise, requantise, round_to_nearest


def _random(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(64, 64), (24, 16), (7, 40)])
def test_weights_on_a_grid_do_not_change(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, shape, generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # each group uses the whole grid
    groups = -(-shape[1] // 32)
    scale = 2.0 ** torch.randint(-4, 2, (shape[0], groups), generator=generator)
    minimum = -scale * torch.randint(0, 16, (shape[0], groups), generator=generator)
    weight = PackedMatrix.from_codes(codes, scale, minimum).widened(torch.float32)
    assert torch.equal(quantise(weight, "int4").widened(torch.float32), weight)


@pytest.mark.parametrize("shape", [(576, 64), (320, 32), (600, 64), (24, 16)])
@pytest.mark.parametrize("native", PACKED_LEVELS)
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_packed_weights_are_quantised_a_few_rows_at_a_time(shape, native, level) -> None:
    matrix = quantise(_random(shape), native)
    found = requantise(matrix, level)
    expected = quantise(matrix.widened(torch.float32), level)
    assert (found.level, found.shape) == (level, shape)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_int8_keeps_integers_of_a_row() -> None:
    weight = torch.arange(-127, 128).float().repeat(3, 1) * torch.tensor([[1.0], [0.5], [4.0]])
    assert torch.equal(quantise(weight, "int8").widened(torch.float32), weight)


@pytest.mark.parametrize("shape", [(64, 64), (24, 16), (7, 40)])
def test_the_search_beats_rounding_to_nearest(shape: tuple[int, int]) -> None:
    weight = _random(shape)
    searched = (quantise(weight, "int4").widened(torch.float32) - weight).square().sum()
    nearest = (round_to_nearest(weight, "int4").widened(torch.float32) - weight).square().sum()
    assert searched < 0.85 * nearest


@pytest.mark.parametrize("level", ["int8", "int4"])
def test_constant_weights_are_kept(level: str) -> None:
    for value in (0.0, 0.5, -2.0):
        weight = torch.full((64, 32), value)
        packed = quantise(weight, level)  # type: ignore[arg-type]
        assert torch.allclose(packed.widened(torch.float32), weight, rtol=2**-8)


def test_an_unknown_level_is_rejected() -> None:
    with pytest.raises(UnknownNameError, match="int2"):
        quantise(torch.zeros(1, 1), "int2")  # type: ignore[arg-type]

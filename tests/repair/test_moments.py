"""Streamed sums are those over all tokens at once."""

import pytest
import torch

from rap_env.repair.regression import Moments

H = 6


def pairs(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, H, generator=generator) + 2
    return x, x @ torch.randn(H, H, generator=generator) - 1


@pytest.mark.parametrize("sizes", [[50], [1, 20, 29], [10] * 5])
def test_they_are_those_of_the_tokens_however_they_come(sizes: list[int]) -> None:
    x, y = pairs()
    sums = Moments(H)
    for a, b in zip(torch.split(x, sizes), torch.split(y, sizes), strict=True):
        sums.add(a, b)
    x, y = x.double(), y.double()
    x0, y0 = torch.arange(H).double(), torch.ones(H).double()
    assert sums.tokens == 50
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sums.x_mean, x.mean(dim=0), **close)
    torch.testing.assert_close(sums.y_mean, y.mean(dim=0), **close)
    torch.testing.assert_close(sums.xx(x0), (x - x0).T @ (x - x0) / 50, **close)
    torch.testing.assert_close(sums.xy(x0, y0), (x - x0).T @ (y - y0) / 50, **close)
    assert sums.yy(y0) == pytest.approx(float((y - y0).square().sum() / 50), rel=1e-6)
    assert sums.y_power == pytest.approx(float(y.square().sum() / 50), rel=1e-6)


def test_the_variance_around_the_mean_survives_a_large_mean() -> None:
    x, y = pairs(2000)
    sums = Moments(H)
    for a, b in zip(torch.split(x + 100, 100), torch.split(y, 100), strict=True):
        sums.add(a, b)
    expected = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(sums.xx(sums.x_mean), expected, rtol=0, atol=2e-2)


def test_half_precision_is_summed_in_full() -> None:
    x, y = (t.bfloat16() for t in pairs(400))
    rounded, exact = Moments(H), Moments(H)
    rounded.add(x, y)
    exact.add(x.float(), y.float())
    assert torch.equal(rounded.xx(torch.zeros(H).double()), exact.xx(torch.zeros(H).double()))
    assert rounded.y_power == exact.y_power

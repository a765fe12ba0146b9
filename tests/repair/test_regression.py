"""The fitted maps: exact where a block is linear, and the best of their rank elsewhere."""

import itertools

import numpy as np
import pytest
import torch

from rap_env.models.families.placeholders import Stub, normalised
from rap_env.repair.fitting import LowRankMap, Moments, allocate_ranks, reduced_rank_ridge

H, N = 6, 200


def states(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, H, generator=generator) @ torch.randn(H, H, generator=generator) + 0.5


def curved(x: torch.Tensor) -> torch.Tensor:
    """A block that no linear map equals."""
    weight = torch.randn(H, H, generator=torch.Generator().manual_seed(9))
    return torch.tanh(normalised(x) @ weight) + 0.3 * normalised(x).square() + 1


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    sums = Moments(H)
    sums.add(normalised(x), y)
    return sums


def stub(fitted: LowRankMap, rank: int) -> Stub:
    return Stub(*(part.float() for part in fitted.tensors(rank)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_block_that_is_linear_is_reproduced(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    inner, outer = (torch.randn(H, rank, generator=generator) for _ in range(2))

    def block(x: torch.Tensor) -> torch.Tensor:
        return normalised(x) @ inner @ outer.T + 0.7

    fitted = reduced_rank_ridge(moments(states(), block(states())), 1e-9, H)
    new = states(seed=1)
    torch.testing.assert_close(stub(fitted, rank)(new), block(new), rtol=1e-3, atol=1e-3)
    errors = fitted.errors(moments(new, block(new)))
    assert errors[rank] < 1e-5 * errors[0]
    assert errors[rank - 1] > 1e-3 * errors[0]


def test_rank_0_is_the_mean() -> None:
    x, y = states(), curved(states())
    fitted = reduced_rank_ridge(moments(x, y), 0.01, 3)
    down, up, mean = fitted.tensors(0)
    assert (down.shape, up.shape) == ((0, H), (H, 0))
    torch.testing.assert_close(mean, y.double().mean(dim=0))
    torch.testing.assert_close(stub(fitted, 0)(x), y.mean(dim=0).expand(N, H))


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_are_those_counted_from_the_tokens(ridge: float, seed: int) -> None:
    fitted = reduced_rank_ridge(moments(states(), curved(states())), ridge, H)
    x = states(seed)  # what it was fitted on, and other tokens
    y = curved(x)
    found = fitted.errors(moments(x, y))
    assert found.shape == (H + 1,)
    for rank in range(H + 1):
        counted = float((stub(fitted, rank)(x) - y).square().sum(dim=1).mean())
        assert float(found[rank]) == pytest.approx(counted, rel=1e-3), rank


def alternated(x: torch.Tensor, y: torch.Tensor, rank: int, penalty: float, seed: int) -> float:
    """Least squared error plus penalty that alternating least squares finds from a random start.

    For an orthonormal `up` the penalty on ``up @ down`` is the one on `down`.
    """
    generator = torch.Generator().manual_seed(seed)
    up = torch.linalg.qr(torch.randn(H, rank, generator=generator).double())[0]
    gram = x.T @ x / len(x) + penalty * torch.eye(H).double()
    for _ in range(300):
        down = torch.linalg.solve(gram, x.T @ y / len(x) @ up)  # (H, r)
        u, _, v = torch.linalg.svd(y.T @ x @ down, full_matrices=False)
        up = u @ v
    error = (y - x @ down @ up.T).square().sum(dim=1).mean()
    return float(error + penalty * down.square().sum())


@pytest.mark.parametrize("ridge", [1e-8, 0.3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_map_of_the_rank_does_better_on_the_tokens_fitted_on(rank: int, ridge: float) -> None:
    sums = moments(states(), curved(states()))
    fitted = reduced_rank_ridge(sums, ridge, H)
    x, y = normalised(states()).double(), curved(states()).double()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    penalty = ridge * float(x.square().mean())
    whole = fitted.inner[:, :rank] @ fitted.basis[:, :rank].T
    ours = float((y - x @ whole).square().sum(dim=1).mean() + penalty * whole.square().sum())
    others = [alternated(x, y, rank, penalty, seed) for seed in range(4)]
    assert ours <= min(others) * (1 + 1e-5)
    assert ours == pytest.approx(min(others), rel=1e-3)  # and they come as near as they can


def test_more_rank_never_fits_the_same_tokens_worse() -> None:
    sums = moments(states(), curved(states()))
    errors = reduced_rank_ridge(sums, 1e-6, H).errors(sums)
    assert (errors[1:] <= errors[:-1]).all()
    assert errors[0] == pytest.approx(sums.yy(sums.y_mean))


def test_states_that_do_not_vary_leave_the_mean() -> None:
    x, y = torch.ones(N, H), curved(states())
    fitted = reduced_rank_ridge(moments(x, y), 0.01, H)
    torch.testing.assert_close(stub(fitted, H)(x), y.mean(dim=0).expand(N, H), rtol=1e-3, atol=1e-3)


def pairs(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, H, generator=generator) + 2
    return x, x @ torch.randn(H, H, generator=generator) - 1


@pytest.mark.parametrize("sizes", [[50], [1, 20, 29], [10] * 5])
def test_moments_do_not_depend_on_the_batching(sizes: list[int]) -> None:
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


def test_half_precision_is_accumulated_in_full_precision() -> None:
    x, y = (t.bfloat16() for t in pairs(400))
    rounded, exact = Moments(H), Moments(H)
    rounded.add(x, y)
    exact.add(x.float(), y.float())
    assert torch.equal(rounded.xx(torch.zeros(H).double()), exact.xx(torch.zeros(H).double()))
    assert rounded.y_power == exact.y_power


def total_loss(losses, choices, ranks) -> float:
    return sum(curve[choices.index(ranks[block])] for block, curve in losses.items())


def best_loss(losses, choices, total) -> float:
    """The least loss of all ways to give ranks."""
    blocks = list(losses)
    ways = itertools.product(choices, repeat=len(blocks))
    fitting = [dict(zip(blocks, way, strict=True)) for way in ways if sum(way) <= total]
    return min(total_loss(losses, choices, ranks) for ranks in fitting)


def falling(seed: int, blocks: int, choices: list[int]) -> dict[int, list[float]]:
    """Loss curves with diminishing returns."""
    rng = np.random.default_rng(seed)
    return {
        block: list(rng.uniform(0.5, 2) * np.exp(-np.array(choices) * rng.uniform(0.05, 0.5)))
        for block in range(blocks)
    }


@pytest.mark.parametrize("seed", range(8))
def test_equal_steps_give_the_optimal_rank_allocation(seed: int) -> None:
    choices = [0, 2, 4, 6]
    losses = falling(seed, 4, choices)
    for total in (0, 2, 8, 14, 24, 100):
        ranks = allocate_ranks(losses, choices, total)
        assert sum(ranks.values()) <= total
        assert total_loss(losses, choices, ranks) == pytest.approx(
            best_loss(losses, choices, total), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(8))
def test_with_uneven_steps_it_loses_less_than_one_step(seed: int) -> None:
    choices = [0, 1, 2, 4, 8]
    losses = falling(seed, 4, choices)
    for total in (5, 11, 20):
        ranks = allocate_ranks(losses, choices, total)
        assert sum(ranks.values()) <= total
        even = dict.fromkeys(losses, max(c for c in choices if 4 * c <= total))
        found = total_loss(losses, choices, ranks)
        assert best_loss(losses, choices, total) <= found
        assert found <= total_loss(losses, choices, even) + 1e-12


@pytest.mark.parametrize(
    ("losses", "choices", "total", "ranks"),
    [
        ({0: [1.0, 1.0, 1.1], 1: [1.0, 0.5, 0.4]}, [0, 8, 16], 100, {0: 0, 1: 16}),  # no gain
        ({0: [1.0, 1.0, 0.2], 1: [1.0, 0.9, 0.85]}, [0, 1, 2], 2, {0: 2, 1: 0}),  # a plateau
        ({0: [1.0, 0.5], 1: [1.0, 0.9]}, [4, 8], 8, {0: 4, 1: 4}),  # the least rank for each
        ({0: [1.0, 0.5], 1: [1.0, 0.9]}, [4, 8], 12, {0: 8, 1: 4}),
    ],
)
def test_ranks_of_known_curves(losses, choices, total, ranks) -> None:
    assert allocate_ranks(losses, choices, total) == ranks

"""The fitted maps: exact where a block is linear, and the best of their rank elsewhere."""

import pytest
import torch

from rap_env.llm.placeholders import Stub, normalised
from rap_env.repair.regression import LowRankMap, Moments, reduced_rank_ridge

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


def test_the_basis_is_orthonormal_and_both_factors_have_columns_of_one_length() -> None:
    fitted = reduced_rank_ridge(moments(states(), curved(states())), 0.01, 4)
    torch.testing.assert_close(fitted.basis.T @ fitted.basis, torch.eye(4).double())
    down, up, _ = fitted.tensors(4)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    torch.testing.assert_close(up @ down, fitted.basis @ fitted.inner.T)


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

"""Reduced-rank ridge regression: the best map of each rank at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rap_env.repair.moments import Moments


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """``y = (x - x_mean) @ inner[:, :r] @ basis[:, :r].T + y_mean``, for every rank r up to R.

    Attributes:
        inner: (H, R), the most useful column first.
        basis: Orthonormal columns, (H, R).
        x_mean: (H,).
        y_mean: (H,).
    """

    inner: torch.Tensor
    basis: torch.Tensor
    x_mean: torch.Tensor
    y_mean: torch.Tensor

    def errors(self, on: Moments) -> torch.Tensor:
        """Mean squared error of rank 0, 1, ... R on some tokens, (R + 1,).

        The columns of `basis` are orthonormal, so each adds its own share of the explained part.
        """
        xx, xy = on.xx(self.x_mean), on.xy(self.x_mean, self.y_mean)
        explained = 2 * (self.inner * (xy @ self.basis)).sum(dim=0)
        explained -= (self.inner * (xx @ self.inner)).sum(dim=0)
        return on.yy(self.y_mean) - torch.cat([explained.new_zeros(1), explained.cumsum(dim=0)])

    def tensors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a stub of that rank holds: down (r, H), up (H, r) and mean (H,), in float64.

        Both factors get columns of the same length, so that one step size suits both when they
        are trained further.
        """
        inner, basis = self.inner[:, :rank], self.basis[:, :rank]
        mean = self.y_mean - basis @ (inner.T @ self.x_mean)
        scale = inner.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return (inner / scale).T.contiguous(), (basis * scale).contiguous(), mean


def reduced_rank_ridge(moments: Moments, ridge: float, rank: int) -> LowRankMap:
    """The map of each rank up to `rank` with the least squared error plus ridge penalty.

    Ridge regression (Hoerl and Kennard 1970), then the leading eigenvectors of what it explains
    (reduced-rank regression, Izenman 1975): among all maps of rank r none does better.

    Args:
        moments: Sums over the tokens to fit.
        ridge: Penalty as a multiple of the mean variance of x; above 0.
        rank: R, at most H.
    """
    x_mean, y_mean = moments.x_mean, moments.y_mean
    xx, xy = moments.xx(x_mean), moments.xy(x_mean, y_mean)
    # The least number keeps the matrix regular where x does not vary at all.
    penalty = ridge * float(xx.diagonal().mean()) + torch.finfo(torch.float32).tiny
    xx.diagonal().add_(penalty)
    full = torch.linalg.solve(xx, xy)
    explained = xy.T @ full  # full' (xx + penalty) full
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    basis = vectors.flip(dims=(1,))[:, :rank]
    return LowRankMap(full @ basis, basis, x_mean, y_mean)

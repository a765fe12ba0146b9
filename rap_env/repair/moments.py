"""Streamed sums from which linear maps are fitted and judged, whatever the number of tokens."""

from __future__ import annotations

import torch


class Moments:
    """Sums over pairs of a normalised state x and what a block adds to it, y (both H wide).

    Args:
        hidden_size: H.

    Attributes:
        tokens: Pairs that were counted in.
    """

    def __init__(self, hidden_size: int) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.tokens = 0
        self._x, self._y = zeros(hidden_size), zeros(hidden_size)
        self._xx, self._xy = zeros(hidden_size, hidden_size), zeros(hidden_size, hidden_size)
        self._yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count the tokens of a batch in.

        Args:
            x: Normalised states, (N, H).
            y: What the block adds to them, (N, H).
        """
        x, y = x.float(), y.float()
        self.tokens += len(x)
        self._x += x.double().sum(dim=0).cpu()
        self._y += y.double().sum(dim=0).cpu()
        # The products of one batch in float32, twice as fast; their sum over batches in float64.
        self._xx += (x.T @ x).cpu()
        self._xy += (x.T @ y).cpu()
        self._yy += float(y.double().square().sum())

    @property
    def x_mean(self) -> torch.Tensor:
        """Mean of x, (H,)."""
        return self._x / self.tokens

    @property
    def y_mean(self) -> torch.Tensor:
        """Mean of y, (H,)."""
        return self._y / self.tokens

    @property
    def y_power(self) -> float:
        """Mean squared norm of y: the error of adding nothing."""
        return self._yy / self.tokens

    def xx(self, x0: torch.Tensor) -> torch.Tensor:
        """Mean of ``(x - x0) (x - x0)'``, (H, H)."""
        mean = self.x_mean
        shift = torch.outer(mean, x0)
        return self._xx / self.tokens - shift - shift.T + torch.outer(x0, x0)

    def xy(self, x0: torch.Tensor, y0: torch.Tensor) -> torch.Tensor:
        """Mean of ``(x - x0) (y - y0)'``, (H, H)."""
        shift = torch.outer(self.x_mean, y0) + torch.outer(x0, self.y_mean)
        return self._xy / self.tokens - shift + torch.outer(x0, y0)

    def yy(self, y0: torch.Tensor) -> float:
        """Mean squared norm of ``y - y0``."""
        return self.y_power - 2 * float(self.y_mean @ y0) + float(y0 @ y0)

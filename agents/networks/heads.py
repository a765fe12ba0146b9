"""What block-wise networks say of their rows: scores of blocks and a value of the whole."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from agents.networks.settings import HIDDEN


class BlockScores(nn.Module):
    """One number for each block; starts near 0 for all, so the first choices are near uniform.

    A linear path beside the small network finds in fewer episodes which features count.

    Args:
        row_width: W.
        hidden: H.
    """

    def __init__(self, row_width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.net = _mlp(row_width, hidden, last_gain=0.01)
        self.linear = nn.Linear(row_width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to scores (B, 2L)."""
        return cast(torch.Tensor, self.net(rows) + self.linear(rows)).squeeze(-1)


class PooledValue(nn.Module):
    """One number for the whole observation: the mean over blocks of what a network sees in each.

    Args:
        row_width: W.
        hidden: H.
    """

    def __init__(self, row_width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.rows = nn.Sequential(_linear(row_width, hidden), nn.ReLU())
        self.value = nn.Sequential(_linear(hidden, hidden), nn.ReLU(), _linear(hidden, 1, gain=1.0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to values (B, 1)."""
        return cast(torch.Tensor, self.value(self.rows(rows).mean(dim=1)))


class ActorCriticHeads(nn.Module):
    """Stands where stable-baselines3 has an MLP extractor, and gives logits and value directly."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.actor = BlockScores(row_width, hidden)
        self.critic = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, 2L) and values (B, 1)."""
        return self.actor(rows), self.critic(rows)

    def forward_actor(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2L)."""
        return cast(torch.Tensor, self.actor(rows))

    def forward_critic(self, rows: torch.Tensor) -> torch.Tensor:
        """Values (B, 1)."""
        return cast(torch.Tensor, self.critic(rows))


class DuelingHeads(nn.Sequential):
    """Q values: a value of the whole observation plus each block's advantage.

    Dueling networks (Wang et al. 2016, arXiv 1511.06581) without the mean subtracted.
    """

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.advantage = BlockScores(row_width, hidden)
        self.value = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to Q values (B, 2L)."""
        return cast(torch.Tensor, self.value(rows) + self.advantage(rows))


def _mlp(width: int, hidden: int, last_gain: float) -> nn.Sequential:
    return nn.Sequential(
        _linear(width, hidden),
        nn.ReLU(),
        _linear(hidden, hidden),
        nn.ReLU(),
        _linear(hidden, 1, last_gain),
    )


def _linear(width: int, out: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer

"""Block-wise networks: what they observe of each block (rows), and their outputs (heads).

Shapes, here and in `agents.sb3_policies`: B observations, 2L blocks, F features of a block, R
entries of the request, W = width of a row, H hidden units. The number of parameters does not
depend on L, unless each block has a learned vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from rap_env.block_rows import (
    IMPORTANCE_FLOOR,
    MOST_SPREADS,
    NEIGHBOURS,
    OVER_FLOOR,
    PRICED,
    SPREAD_FLOOR,
    USEFUL_FLOOR,
    row_columns,
    row_width,
    shown,
)
from rap_env.observation import BLOCK_FEATURES, REQUEST_FEATURES

_OVER = REQUEST_FEATURES.index("bytes_over")
_KIND = BLOCK_FEATURES.index("kind")
_FREED = BLOCK_FEATURES.index("freed_share")
_VECTOR_SPREAD = 0.3


class BlockRows(BaseFeaturesExtractor):
    """Joins each block's features with those of the whole request.

    `rap_env.block_rows.row_columns` lists the parts of a row. Standardised features compare a
    block with the others, independently of the model's size. Neighbours are included because a
    block next to a removed one is often less important. A price is the log of a measured
    importance per useful byte, a ratio that a small network would need many episodes to learn.
    The NumPy network of the runtime (`rap_env.runtime.policy_network`) computes the same rows.

    Args:
        observation_space: That of `rap_env.observation.ObservationBuilder`: a ``Dict``
            with ``request`` (R,), ``blocks`` (2L, F) and ``action_mask`` (2L,).
        block_vectors: As in `agents.settings.PolicySettings`.
        without: As in `PolicySettings`; hidden features are 0.
    """

    vectors: torch.Tensor

    def __init__(
        self,
        observation_space: spaces.Dict,
        block_vectors: int = 0,
        without: Sequence[str] = (),
    ) -> None:
        count = _shape(observation_space, "blocks")[0]
        super().__init__(observation_space, features_dim=row_width(block_vectors))
        self.columns = row_columns(block_vectors)
        self.see_request = "request" not in without
        for name, columns in (("_seen", BLOCK_FEATURES), ("_priced", PRICED)):
            flags = torch.from_numpy(shown(columns, without))
            self.register_buffer(name, flags, persistent=False)
        vectors = _VECTOR_SPREAD * torch.randn(count, block_vectors)
        if block_vectors:
            self.vectors = nn.Parameter(vectors)
        else:  # not in the state dict, so that the network serves any number of blocks
            self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return rows of shape (B, 2L, W)."""
        blocks = observations["blocks"] * cast(torch.Tensor, self._seen)
        request = observations["request"] * float(self.see_request)
        kept = observations["action_mask"].to(blocks.dtype).unsqueeze(-1)
        removed = 1 - kept
        useful = _useful(blocks, request) * kept
        importance = blocks[:, :, [BLOCK_FEATURES.index(name) for name in PRICED]]
        prices = torch.log((importance + IMPORTANCE_FLOOR) / (useful + USEFUL_FLOOR))
        priced = prices * cast(torch.Tensor, self._priced)
        vectors = self.vectors.expand(len(blocks), -1, -1)
        parts = {
            "blocks": blocks,
            "compared": _standardised(torch.cat([blocks, priced], dim=2), kept),
            "useful": useful,
            "kept": kept,
            "neighbours": _neighbours(kept),
            "vectors": vectors,
            "request": request,
            "mean_kept": _mean(blocks, kept),
            "mean_removed": _mean(blocks, removed),
            "removed_by_kind": _removed_by_kind(blocks, removed),
            "removed_vectors": _mean(vectors, removed),
        }
        rows = [_for_each_block(parts[name], blocks.shape[1]) for name in self.columns]
        return torch.cat(rows, dim=2)


def _for_each_block(part: torch.Tensor, count: int) -> torch.Tensor:
    """Return a part of the rows, (B, 2L, F); a part of shape (B, F) is repeated for all blocks."""
    return part if part.dim() == 3 else part.unsqueeze(1).expand(-1, count, -1)


def _useful(blocks: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """Return the share of the bytes over budget that each block would free, (B, 2L, 1)."""
    over = request[:, _OVER].reshape(-1, 1, 1)
    return (blocks[:, :, [_FREED]] / (over + OVER_FLOOR)).clamp(max=1)


def _neighbours(kept: torch.Tensor) -> torch.Tensor:
    """Return whether each block's neighbours are kept, (B, 2L, 4); 1 beyond the ends."""
    reach, count = max(NEIGHBOURS), kept.shape[1]
    padded = nn.functional.pad(kept, (0, 0, reach, reach), value=1.0)
    near = [padded[:, reach + step : reach + step + count] for step in NEIGHBOURS]
    return torch.cat(near, dim=2)


def _removed_by_kind(blocks: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Return the shares of removed attention and removed FFN blocks, (B, 2)."""
    ffn = blocks[:, :, [_KIND]]
    kinds = torch.cat([1 - ffn, ffn], dim=2)
    return (kinds * removed).sum(dim=1) / kinds.sum(dim=1).clamp(min=1)


def _mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean over blocks, (B, F); 0 if all weights are 0."""
    return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _standardised(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return z-scores over the kept blocks, clamped; 0 for removed blocks."""
    centred = (values - _mean(values, kept).unsqueeze(1)) * kept
    spread = _mean(centred.square(), kept).sqrt().unsqueeze(1)
    return (centred / (spread + SPREAD_FLOOR)).clamp(-MOST_SPREADS, MOST_SPREADS)


def _shape(space: spaces.Dict, key: str) -> tuple[int, ...]:
    return cast(tuple[int, ...], space[key].shape)


class BlockScores(nn.Module):
    """Scores each block; all scores start near 0, so the first choices are nearly uniform.

    A linear path parallel to the small network learns the important features in fewer episodes.
    """

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.net = _mlp(row_width, hidden, last_gain=0.01)
        self.linear = nn.Linear(row_width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows (B, 2L, W) to scores (B, 2L)."""
        return cast(torch.Tensor, self.net(rows) + self.linear(rows)).squeeze(-1)


class PooledValue(nn.Module):
    """Value of the whole observation, from the mean over blocks of a network's features."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.rows = nn.Sequential(_linear(row_width, hidden), nn.ReLU())
        self.value = nn.Sequential(_linear(hidden, hidden), nn.ReLU(), _linear(hidden, 1, gain=1.0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows (B, 2L, W) to values (B, 1)."""
        return cast(torch.Tensor, self.value(self.rows(rows).mean(dim=1)))


class ActorCriticHeads(nn.Module):
    """Replaces the MLP extractor of stable-baselines3; returns logits and value directly."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.actor = BlockScores(row_width, hidden)
        self.critic = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, 2L) and values (B, 1)."""
        return self.actor(rows), self.critic(rows)

    def forward_actor(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 2L)."""
        return cast(torch.Tensor, self.actor(rows))

    def forward_critic(self, rows: torch.Tensor) -> torch.Tensor:
        """Return values (B, 1)."""
        return cast(torch.Tensor, self.critic(rows))


class DuelingHeads(nn.Sequential):
    """Q values: the value of the observation plus each block's advantage.

    Dueling networks (Wang et al. 2016, arXiv 1511.06581) without subtracting the mean.
    """

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.advantage = BlockScores(row_width, hidden)
        self.value = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows (B, 2L, W) to Q values (B, 2L)."""
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

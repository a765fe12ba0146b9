"""What a block-wise network sees of each block: its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.networks.settings import PolicySettings
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
    """Joins each block's features with what holds for the whole request.

    What a row consists of is said by `rap_env.block_rows.row_columns`. Standardised features
    say how a block compares with the others, whatever the model's size; a block beside a removed
    one often loses its worth; a price is the log of a measured importance per useful byte, a
    ratio that a small network would need many episodes to find. The NumPy network of the runtime
    (`rap_env.runtime.policy_network`) sees the same.

    Args:
        observation_space: That of `rap_env.observation.ObservationBuilder`: a ``Dict``
            with ``request`` (R,), ``blocks`` (2L, F) and ``action_mask`` (2L,).
        block_vectors: As in `PolicySettings`.
        without: As in `PolicySettings`; what is hidden reads 0.
    """

    vectors: torch.Tensor

    def __init__(
        self,
        observation_space: spaces.Dict,
        block_vectors: int = 0,
        without: Sequence[str] = (),
    ) -> None:
        checked = PolicySettings(block_vectors=block_vectors, without=tuple(without))
        count = _shape(observation_space, "blocks")[0]
        super().__init__(observation_space, features_dim=row_width(block_vectors))
        self.columns = row_columns(block_vectors)
        self.see_request = "request" not in checked.without
        for name, columns in (("_seen", BLOCK_FEATURES), ("_priced", PRICED)):
            flags = torch.from_numpy(shown(columns, checked.without))
            self.register_buffer(name, flags, persistent=False)
        vectors = _VECTOR_SPREAD * torch.randn(count, block_vectors)
        if block_vectors:
            self.vectors = nn.Parameter(vectors)
        else:  # nothing to learn, nothing to save: the network serves any number of blocks
            self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows of shape (B, 2L, W)."""
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
    """A part of the rows, (B, 2L, ...); one of the whole, (B, ...), is repeated for every block."""
    return part if part.dim() == 3 else part.unsqueeze(1).expand(-1, count, -1)


def _useful(blocks: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """The share of the bytes over budget that each block would free, (B, 2L, 1), at most 1."""
    over = request[:, _OVER].reshape(-1, 1, 1)
    return (blocks[:, :, [_FREED]] / (over + OVER_FLOOR)).clamp(max=1)


def _neighbours(kept: torch.Tensor) -> torch.Tensor:
    """Whether the blocks beside each are kept, (B, 2L, 1) to (B, 2L, 4); 1 beyond the ends."""
    reach, count = max(NEIGHBOURS), kept.shape[1]
    padded = nn.functional.pad(kept, (0, 0, reach, reach), value=1.0)
    near = [padded[:, reach + step : reach + step + count] for step in NEIGHBOURS]
    return torch.cat(near, dim=2)


def _removed_by_kind(blocks: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Share of the attn and share of the ffn blocks that are gone, (B, 2)."""
    ffn = blocks[:, :, [_KIND]]
    kinds = torch.cat([1 - ffn, ffn], dim=2)
    return (kinds * removed).sum(dim=1) / kinds.sum(dim=1).clamp(min=1)


def _mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean over blocks, (B, 2L, F) to (B, F); 0 where all weights are."""
    return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _standardised(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean of the kept blocks, in units of their spread; 0 for the others."""
    centred = (values - _mean(values, kept).unsqueeze(1)) * kept
    spread = _mean(centred.square(), kept).sqrt().unsqueeze(1)
    return (centred / (spread + SPREAD_FLOOR)).clamp(-MOST_SPREADS, MOST_SPREADS)


def _shape(space: spaces.Dict, key: str) -> tuple[int, ...]:
    return cast(tuple[int, ...], space[key].shape)

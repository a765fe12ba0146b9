"""What a block-wise network sees of each block: its row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.networks.settings import PolicySettings
from rap_env.envs.observation import BLOCK_FEATURES, REQUEST_FEATURES

NEIGHBOURS = (-2, -1, 1, 2)
"""Places of the blocks beside one: those of its own layer and of the layers next to it."""

_OVER = REQUEST_FEATURES.index("bytes_over")
_KIND = BLOCK_FEATURES.index("kind")
_FREED = BLOCK_FEATURES.index("freed_share")
_PRICED = ("one_shot_loss", "gsi_marginal_loss")
_HIDES = {
    "gsi": ("gsi_rank", "gsi_marginal_loss"),
    "one_shot": ("one_shot_loss",),
    "request": ("freed_share",),
}
_VECTOR_SPREAD = 0.3


class BlockRows(BaseFeaturesExtractor):
    """Joins each block's features with what holds for the whole request.

    A row is, of the block: its features; the same and the prices below standardised over the
    kept blocks, so that what matters is how a block compares with the others, whatever the
    model's size; the share of the bytes still over budget that it would free, at most 1;
    whether it is kept; whether its neighbours are (beyond the ends all are), since a block
    beside a removed one often loses its worth; its vector, if blocks have one. Of the whole:
    the request; the mean features of the kept and of the removed blocks; the shares of attn and
    of ffn blocks removed; the mean vector of the removed blocks. A price is the log of a
    measured importance per useful byte: a ratio that a small network would need many episodes
    to find.

    Args:
        observation_space: That of `rap_env.envs.observation.ObservationBuilder`: a ``Dict``
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
        count, features = _shape(observation_space, "blocks")
        request = _shape(observation_space, "request")[0]
        of_block = 2 * features + len(_PRICED) + 2 + len(NEIGHBOURS) + block_vectors
        of_whole = request + 2 * features + 2 + block_vectors
        super().__init__(observation_space, features_dim=of_block + of_whole)
        hidden = {column for name in checked.without for column in _HIDES[name]}
        self.see_request = "request" not in checked.without
        self.register_buffer("_seen", _shown(BLOCK_FEATURES, hidden), persistent=False)
        self.register_buffer("_priced", _shown(_PRICED, hidden), persistent=False)
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
        importance = blocks[:, :, [BLOCK_FEATURES.index(name) for name in _PRICED]]
        prices = torch.log((importance + 1e-2) / (useful + 1e-3))
        priced = prices * cast(torch.Tensor, self._priced)
        compared = _standardised(torch.cat([blocks, priced], dim=2), kept)
        vectors = self.vectors.expand(len(blocks), -1, -1)
        whole = [request, _mean(blocks, kept), _mean(blocks, removed)]
        whole += [_removed_by_kind(blocks, removed), _mean(vectors, removed)]
        everywhere = torch.cat(whole, dim=1).unsqueeze(1).expand(-1, blocks.shape[1], -1)
        own = [blocks, compared, useful, kept, _neighbours(kept), vectors]
        return torch.cat([*own, everywhere], dim=2)


def _useful(blocks: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """The share of the bytes over budget that each block would free, (B, 2L, 1), at most 1."""
    over = request[:, _OVER].reshape(-1, 1, 1)
    return (blocks[:, :, [_FREED]] / (over + 1e-6)).clamp(max=1)


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
    return (centred / (spread + 1e-4)).clamp(-3, 3)


def _shown(names: Sequence[str], hidden: Collection[str]) -> torch.Tensor:
    return torch.tensor([float(name not in hidden) for name in names])


def _shape(space: spaces.Dict, key: str) -> tuple[int, ...]:
    return cast(tuple[int, ...], space[key].shape)

"""Observations of a request and a mask. No model is run, so runtime policies use them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from rap_env.costs import Counts, request_costs
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

REQUEST_FEATURES = ("budget", "batch_size", "seq_len", "bytes_over", "kv_share")
"""Columns of the observation's ``request``."""

BLOCK_FEATURES = (
    "kind",
    "depth",
    "kept",
    "freed_share",
    "one_shot_loss",
    "gsi_rank",
    "gsi_marginal_loss",
)
"""Columns of the observation's ``blocks``."""

MAX_BATCH_LOG2 = 8
"""A batch of 256 or more sequences is observed as 1.0."""

BYTES_OVER = REQUEST_FEATURES.index("bytes_over")
"""The column of ``request`` that depends on the mask."""

FREED = BLOCK_FEATURES.index("freed_share")

KEPT_AND_FREED = slice(BLOCK_FEATURES.index("kept"), FREED + 1)
"""The columns of ``blocks`` that are zero once a block is removed."""

Observation = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ImportanceFeatures:
    """Importance of the 2L blocks as arrays, as an agent observes it.

    Attributes:
        one_shot: ΔNLL of removing only this block, nats per token, (2L,).
        gsi_rank: Position in the GSI order, 0 = removed first, 1 = last, (2L,).
        gsi_marginal_loss: ΔNLL added by its removal in that order, nats per token, (2L,).
    """

    one_shot: npt.NDArray[np.float64]
    gsi_rank: npt.NDArray[np.float64]
    gsi_marginal_loss: npt.NDArray[np.float64]

    @classmethod
    def none(cls, num_blocks: int) -> ImportanceFeatures:
        """Zeros: the agent observes no importance."""
        zeros = np.zeros(num_blocks)
        return cls(zeros, zeros, zeros)

    @classmethod
    def from_one_shot(cls, delta_nll: npt.NDArray[np.float64]) -> ImportanceFeatures:
        """The one-shot order in place of the GSI order, if GSI was not run."""
        rank = np.argsort(np.argsort(delta_nll, kind="stable")) / max(1, len(delta_nll) - 1)
        return cls(delta_nll, rank, delta_nll)


class ObservationBuilder:
    """Builds observations of one model with L layers.

    Args:
        memory: The model's byte arithmetic.
        features: Importance of the blocks (see `rap_env.importance`).

    Attributes:
        space: ``Dict`` of ``request`` (5,) and ``blocks`` (2L, 7), float32 in [0, 1], and
            ``action_mask`` (2L,), int8, 1 where a block may still be removed.
    """

    def __init__(self, memory: MemoryModel, features: ImportanceFeatures) -> None:
        self.memory = memory
        count = memory.facts.num_blocks
        self.space: spaces.Space[Observation] = spaces.Dict(  # type: ignore[assignment]
            {
                "request": spaces.Box(0.0, 1.0, (len(REQUEST_FEATURES),), np.float32),
                "blocks": spaces.Box(0.0, 1.0, (count, len(BLOCK_FEATURES)), np.float32),
                "action_mask": spaces.MultiBinary(count),
            }
        )
        index = np.arange(count)
        table = np.zeros((count, len(BLOCK_FEATURES)), dtype=np.float32)
        table[:, 0] = index % 2
        table[:, 1] = (index // 2) / max(1, memory.facts.num_layers - 1)
        table[:, 2] = 1.0
        table[:, 4] = squash(features.one_shot)
        table[:, 5] = np.clip(features.gsi_rank, 0.0, 1.0)
        table[:, 6] = squash(features.gsi_marginal_loss)
        self._dense = table  # columns that do not depend on the request, with every block kept

    def dense(self, request: Request) -> Observation:
        """The observation of the dense model under `request`, in new arrays.

        Raises:
            InvalidRequestError: The model cannot serve the request.
        """
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        blocks = self.dense_blocks(costs.freed_share)
        return {
            "request": request_features(
                self.memory,
                **vars(request),
                dense_peak_bytes=costs.dense_peak_bytes,
                kv_cache_bytes=costs.kv_cache_bytes,
            ),
            "blocks": blocks,
            "action_mask": np.ones(len(blocks), dtype=np.int8),
        }

    def dense_blocks(self, freed_share: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Rows of the dense model's blocks, (..., 2L, 7), from their freed shares, (..., 2L)."""
        blocks = np.empty((*freed_share.shape, len(BLOCK_FEATURES)), dtype=np.float32)
        blocks[...] = self._dense
        blocks[..., FREED] = freed_share
        return blocks

    def build(self, request: Request, mask: Plan) -> Observation:
        """The observation of `mask` under `request`, in new arrays.

        Raises:
            InvalidRequestError: The model cannot serve the request.
            UnknownNameError: The mask names blocks that the model does not have.
        """
        seen = self.dense(request)
        if not mask:
            return seen
        removed = sorted(mask.check(self.memory.facts.num_blocks).removed)
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        seen["request"][BYTES_OVER] = bytes_over(
            costs.peak_bytes(removed), request.budget_bytes, costs.dense_peak_bytes
        )
        seen["blocks"][removed, KEPT_AND_FREED] = 0.0
        seen["action_mask"][removed] = 0
        return seen


def request_features(
    memory: MemoryModel,
    *,
    batch_size: int | Counts,
    seq_len_tokens: int | Counts,
    budget_bytes: int | Counts,
    dense_peak_bytes: int | Counts,
    kv_cache_bytes: int | Counts,
) -> npt.NDArray[np.float32]:
    """The features `REQUEST_FEATURES` of a request that the unchanged model serves, (5,).

    Args:
        memory: The model's byte arithmetic.
        batch_size: Of the request; like the others, a number, or an array (n,) for n requests.
        seq_len_tokens: Of the request.
        budget_bytes: Of the request.
        dense_peak_bytes: Peak bytes of the unchanged model.
        kv_cache_bytes: Bytes of its KV cache.

    Returns:
        The features, (5,) or (n, 5).
    """
    seen = [
        np.minimum(1.0, budget_bytes / dense_peak_bytes),
        np.minimum(1.0, np.log2(batch_size) / MAX_BATCH_LOG2),
        np.minimum(1.0, np.log2(seq_len_tokens) / np.log2(max(2, memory.facts.max_positions))),
        np.maximum(0, dense_peak_bytes - budget_bytes) / dense_peak_bytes,
        kv_cache_bytes / dense_peak_bytes,
    ]
    return np.array(seen, dtype=np.float32).T


def bytes_over(peak_bytes: int, budget_bytes: int, dense_peak_bytes: int) -> float:
    """Bytes above the budget as a share of the dense peak, in [0, 1]."""
    return min(1.0, max(0, peak_bytes - budget_bytes) / dense_peak_bytes)


def squash(loss: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Map ΔNLL values in nats per token onto [0, 1): x / (1 + x), and 0 below 0.

    Infinity gives 1.
    """
    positive = np.maximum(np.asarray(loss, dtype=np.float64), 0.0)
    return np.asarray(1.0 - 1.0 / (1.0 + positive), dtype=np.float32)

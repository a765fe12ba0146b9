"""What an agent sees of a request and a mask. Pure: no model is run, so policies use it live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.workload import Request

if TYPE_CHECKING:
    from rap_env.importance import ImportanceFeatures

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
"""A batch of 256 sequences or more is seen as 1.0."""

Observation = dict[str, npt.NDArray[Any]]

_RequestFacts = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]


class ObservationBuilder:
    """Builds observations of one model with L layers.

    Args:
        memory: The model's byte arithmetic.
        features: What was measured of each block once (see `rap_env.importance`).

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
        table[:, 4] = squash(features.one_shot)
        table[:, 5] = np.clip(features.gsi_rank, 0.0, 1.0)
        table[:, 6] = squash(features.gsi_marginal_loss)
        self._constant = table  # the columns that no request and no mask changes
        self._last: tuple[Request, _RequestFacts] | None = None

    def build(self, request: Request, mask: BlockMask) -> Observation:
        """The observation of `mask` under `request`, in arrays of its own.

        Raises:
            InvalidRequestError: The model cannot serve the request.
            UnknownNameError: The mask names blocks that the model does not have.
        """
        dense_peak, freed, fixed = self._of_request(request)
        kept = kept_blocks(mask, self.memory.facts.num_blocks)
        seen = fixed.copy()
        over = self.memory.peak_bytes(mask, request) - request.budget_bytes
        seen[3] = min(1.0, max(0, over) / dense_peak)
        blocks = self._constant.copy()
        blocks[:, 2] = kept
        blocks[:, 3] = np.where(kept, freed, 0.0)
        return {"request": seen, "blocks": blocks, "action_mask": kept.astype(np.int8)}

    def _of_request(self, request: Request) -> _RequestFacts:
        """Dense peak in bytes, freed shares (2L,) and request features (5,) of a request."""
        if self._last is not None and self._last[0] == request:
            return self._last[1]  # constant in an episode
        dense = self.memory.breakdown(BlockMask(), request)
        freed = np.minimum(self.memory.freed_bytes(request) / dense.peak, 1.0)
        longest = max(2, self.memory.facts.max_positions)
        fixed = [
            min(1.0, request.budget_bytes / dense.peak),
            min(1.0, np.log2(request.batch_size) / MAX_BATCH_LOG2),
            min(1.0, np.log2(request.seq_len_tokens) / np.log2(longest)),
            0.0,  # bytes over: the one that depends on the mask
            dense.kv_cache / dense.peak,
        ]
        facts = (dense.peak, freed.astype(np.float32), np.array(fixed, dtype=np.float32))
        self._last = (request, facts)
        return facts


def kept_blocks(mask: BlockMask, num_blocks: int) -> npt.NDArray[np.bool_]:
    """True for each block that `mask` keeps, shape (2L,).

    Raises:
        UnknownNameError: The mask names blocks that the model does not have.
    """
    kept = np.ones(num_blocks, dtype=bool)
    kept[list(mask.check(num_blocks).indices)] = False
    return kept


def squash(loss: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Losses in nats per token onto [0, 1): x / (1 + x), 0 for what is below 0.

    A loss has no upper bound: infinity gives 1.
    """
    positive = np.maximum(np.asarray(loss, dtype=np.float64), 0.0)
    return np.asarray(1.0 - 1.0 / (1.0 + positive), dtype=np.float32)

"""Batches of observations: `ObservationBuilder` for many masks at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rap_env.costs import Counts, Flags, VectorByteTracker, request_costs
from rap_env.observation import BYTES_OVER, KEPT_AND_FREED, Observation, ObservationBuilder
from rap_env.request import Request


class MaskObserver:
    """Observes batches of n masks under some requests, on a model of 2L blocks.

    Args:
        builder: Builds the observation of the dense model, once for each request.
        requests: The requests; the methods refer to them by index.
    """

    def __init__(self, builder: ObservationBuilder, requests: Sequence[Request]) -> None:
        memory = builder.memory
        dense = [builder.dense(request) for request in requests]
        self._request = np.stack([seen["request"] for seen in dense])
        self._blocks = np.stack([seen["blocks"] for seen in dense])
        self._bytes = VectorByteTracker(len(requests), memory.facts.num_blocks)
        for row, request in enumerate(requests):
            costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
            self._bytes.start(row, costs)
        self._budget = np.array([request.budget_bytes for request in requests])

    def over_bytes(self, which: Counts, removed: Flags) -> Counts:
        """Return the bytes above the budget, 0 where the request fits.

        Args:
            which: Index of each mask's request, (n,).
            removed: The blocks that each mask removes, (n, 2L).

        Returns:
            Bytes, (n,).
        """
        peak = self._bytes.peaks_of(which, removed)
        return np.asarray(np.maximum(0, peak - self._budget[which]))

    def observe(self, which: Counts, removed: Flags) -> Observation:
        """Return the observations of masks; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``blocks`` (n, 2L, F) and ``action_mask`` (n, 2L), all float32.
        """
        request, blocks = self._request[which], self._blocks[which]
        over = self.over_bytes(which, removed) / self._bytes.dense_peak_bytes[which]
        request[:, BYTES_OVER] = np.minimum(1.0, over)
        kept = (~removed).astype(np.float32)
        blocks[:, :, KEPT_AND_FREED] *= kept[:, :, None]
        return {"request": request, "blocks": blocks, "action_mask": kept}


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """Return an observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}

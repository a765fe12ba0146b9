"""Observations of many masks at once, as arrays: what `ObservationBuilder` gives of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rap_env.costs import VectorByteTracker, request_costs
from rap_env.observation import BYTES_OVER, KEPT_AND_FREED, Observation, ObservationBuilder
from rap_env.request import Request

Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


class MaskObserver:
    """Observes masks under some requests on a model of 2L blocks, n masks in one go.

    Args:
        builder: Makes the observation of the dense model, once for each request.
        requests: The requests; they are named by their place from here on.

    Raises:
        InvalidRequestError: The model cannot serve one of them.
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
        """Bytes above the budget, 0 where the request fits.

        Args:
            which: The request of each mask, (n,).
            removed: The blocks that each mask removes, (n, 2L).

        Returns:
            Bytes, (n,).
        """
        peak = self._bytes.peaks_of(which, removed)
        return np.asarray(np.maximum(0, peak - self._budget[which]))

    def observe(self, which: Counts, removed: Flags) -> Observation:
        """What an agent sees of the masks; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``blocks`` (n, 2L, F) and ``action_mask`` (n, 2L), float32 all.
        """
        request, blocks = self._request[which], self._blocks[which]
        over = self.over_bytes(which, removed) / self._bytes.dense_peak_bytes[which]
        request[:, BYTES_OVER] = np.minimum(1.0, over)
        kept = (~removed).astype(np.float32)
        blocks[:, :, KEPT_AND_FREED] *= kept[:, :, None]
        return {"request": request, "blocks": blocks, "action_mask": kept}


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """An observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}

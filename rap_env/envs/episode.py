"""An episode of one environment, kept up to date removal by removal: nothing is added up anew."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from rap_env.blocks import BlockMask, block_name
from rap_env.envs.task import Measured, Start
from rap_env.observation import (
    BYTES_OVER,
    KEPT_AND_FREED,
    Observation,
    ObservationBuilder,
    bytes_over,
)

_name = lru_cache(maxsize=4096)(block_name)


class RemovedBlocks:
    """The blocks that an episode removed so far, in ascending order.

    Args:
        indices: Those it begins with.

    Attributes:
        indices: Their indices.
        names: Their names.
    """

    __slots__ = ("indices", "names")

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self.indices = sorted(indices)
        self.names = [_name(index) for index in self.indices]

    def add(self, index: int) -> None:
        """Note a removal."""
        place = bisect(self.indices, index)
        self.indices.insert(place, index)
        self.names.insert(place, _name(index))

    def mask(self, *more: int) -> BlockMask:
        """The mask that removes these blocks, and `more`."""
        return BlockMask(frozenset((*self.indices, *more)))


class Episode:
    """One episode. Nothing outside changes its arrays, and it gives copies of them away.

    Args:
        start: The request and what it costs.
        dense: What the model says of the dense mask.
        builder: Makes the observation of the dense model.

    Attributes:
        start: As given.
        removed: The blocks removed so far.
        peak_bytes: Bytes that the request needs without them.
        measured: What the model said of the mask, or None if it was not asked.
        invalid_actions: Actions so far on blocks that were removed already.
        over: The episode has terminated or was truncated.
    """

    def __init__(self, start: Start, dense: Measured, builder: ObservationBuilder) -> None:
        self.start = start
        self.removed = RemovedBlocks()
        self.peak_bytes = start.costs.dense_peak_bytes
        self.measured: Measured | None = dense
        self.invalid_actions = 0
        self.over = False
        self._ffn_left = len(start.costs.freed) // 2
        self._request = dict(vars(start.request))
        self._seen = builder.dense(start.request)

    @property
    def loss(self) -> float | None:
        """Loss of the mask in nats per token, or None if it was not measured."""
        return None if self.measured is None else self.measured.loss

    def has_removed(self, index: int) -> bool:
        """Whether block `index` is gone already."""
        return index in self.removed.indices

    def peak_without(self, index: int) -> int:
        """Peak bytes once the kept block `index` is removed too."""
        peak = self.peak_bytes - self.start.costs.freed[index]
        last_ffn = index % 2 == 1 and self._ffn_left == 1
        return peak - self.start.costs.last_ffn_bytes if last_ffn else peak

    def remove(self, index: int, peak_bytes: int) -> None:
        """Remove the kept block `index`, which leaves `peak_bytes`."""
        self.removed.add(index)
        self.peak_bytes = peak_bytes
        self._ffn_left -= index % 2
        start, seen = self.start, self._seen
        seen["request"][BYTES_OVER] = bytes_over(
            peak_bytes, start.request.budget_bytes, start.costs.dense_peak_bytes
        )
        seen["blocks"][index, KEPT_AND_FREED] = 0.0
        seen["action_mask"][index] = 0

    def observation(self) -> Observation:
        """What the agent sees now, in arrays of its own."""
        return {key: array.copy() for key, array in self._seen.items()}

    def info(self, terms: dict[str, float]) -> dict[str, Any]:
        """What else there is to know, with the reward's `terms` by name."""
        info: dict[str, Any] = {
            "removed": self.removed.names.copy(),
            "peak_bytes": self.peak_bytes,
            "request": self._request.copy(),
            "reward_terms": terms,
        }
        if self.measured is not None:
            info["nll"] = self.measured.nll
            info["loss"] = self.measured.loss
            if self.measured.baseline_loss is not None:
                info["baseline_loss"] = self.measured.baseline_loss
            if self.measured.predicted:
                info["predicted"] = True
        if self.start.asked_budget_bytes is not None:
            info["infeasible"] = {"asked_budget_bytes": self.start.asked_budget_bytes}
        return info

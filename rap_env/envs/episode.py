"""The episode of one environment, updated with each removal instead of being recomputed."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from rap_env.blocks import BlockMask, block_name
from rap_env.costs import RequestCosts, request_costs
from rap_env.memory import MemoryModel
from rap_env.observation import (
    BYTES_OVER,
    KEPT_AND_FREED,
    Observation,
    ObservationBuilder,
    bytes_over,
)
from rap_env.request import Request

_name = lru_cache(maxsize=4096)(block_name)


class Measurement(NamedTuple):
    """Measurements of a mask by the model.

    Attributes:
        nll: NLL in nats per token.
        delta_nll: NLL minus the dense model's.
        predicted: Whether the score is the prediction of a score table, not a measurement.
        baseline_delta_nll: The ΔNLL of the mask that the reward's baseline has for the same
            request, or None where the reward did not ask for it.
    """

    nll: float
    delta_nll: float
    predicted: bool
    baseline_delta_nll: float | None = None


@dataclass(frozen=True)
class EpisodeStart:
    """The initial state of an episode: the dense model under a request.

    Attributes:
        costs: What the dense model needs for it, and what each removal frees.
        asked_budget_bytes: The budget before it was raised to the least possible one, or None.
    """

    request: Request
    costs: RequestCosts
    asked_budget_bytes: int | None = None

    @classmethod
    def of(
        cls, memory: MemoryModel, request: Request, asked_budget_bytes: int | None = None
    ) -> EpisodeStart:
        """The start of an episode with a request that the model can serve."""
        costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
        return cls(request, costs, asked_budget_bytes)

    @property
    def fits_dense(self) -> bool:
        """Whether the dense model fits the request, so that there is nothing to remove."""
        return self.costs.dense_peak_bytes <= self.request.budget_bytes


class RemovedBlocks:
    """Indices and names of the blocks that an episode has removed, in ascending order."""

    __slots__ = ("indices", "names")

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self.indices = sorted(indices)
        self.names = [_name(index) for index in self.indices]

    def add(self, index: int) -> None:
        """Add a block."""
        position = bisect(self.indices, index)
        self.indices.insert(position, index)
        self.names.insert(position, _name(index))

    def mask(self, *more: int) -> BlockMask:
        """The mask that removes these blocks and `more`."""
        return BlockMask(frozenset((*self.indices, *more)))


class Episode:
    """The state of one episode. It returns copies of its arrays.

    Attributes:
        removed: The blocks removed so far.
        bytes: Tracks the bytes that the request needs without them.
        measurement: What the model measured of the mask, or None if it was not measured.
        invalid_actions: Number of actions on blocks that were removed already.
        over: Whether the episode has terminated or was truncated.
    """

    def __init__(
        self, start: EpisodeStart, dense: Measurement, builder: ObservationBuilder
    ) -> None:
        self.start = start
        self.removed = RemovedBlocks()
        self.bytes = start.costs.tracker()
        self.measurement: Measurement | None = dense
        self.invalid_actions = 0
        self.over = False
        self._request = dict(vars(start.request))
        self._observation = builder.dense(start.request)

    @property
    def delta_nll(self) -> float | None:
        """ΔNLL of the mask in nats per token, or None if it was not measured."""
        return None if self.measurement is None else self.measurement.delta_nll

    def has_removed(self, index: int) -> bool:
        """Whether block `index` is removed."""
        return index in self.removed.indices

    def remove(self, index: int) -> None:
        """Remove the kept block `index`."""
        self.removed.add(index)
        self.bytes.remove(index)
        start, observation = self.start, self._observation
        observation["request"][BYTES_OVER] = bytes_over(
            self.bytes.peak_bytes, start.request.budget_bytes, start.costs.dense_peak_bytes
        )
        observation["blocks"][index, KEPT_AND_FREED] = 0.0
        observation["action_mask"][index] = 0

    def observation(self) -> Observation:
        """The current observation, in new arrays."""
        return {key: array.copy() for key, array in self._observation.items()}

    def info(self, terms: dict[str, float]) -> dict[str, Any]:
        """The info dict, with the reward's `terms` by name."""
        info: dict[str, Any] = {
            "removed": self.removed.names.copy(),
            "peak_bytes": self.bytes.peak_bytes,
            "request": self._request.copy(),
            "reward_terms": terms,
        }
        measurement = self.measurement
        if measurement is not None:
            info["nll"] = measurement.nll
            info["loss"] = measurement.delta_nll
            if measurement.baseline_delta_nll is not None:
                info["baseline_loss"] = measurement.baseline_delta_nll
            if measurement.predicted:
                info["predicted"] = True
        if self.start.asked_budget_bytes is not None:
            info["infeasible"] = {"asked_budget_bytes": self.start.asked_budget_bytes}
        return info

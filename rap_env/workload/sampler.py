"""What every sampler of requests does."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

import numpy as np

from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel


class RequestSampler(ABC):
    """Draws the request of an episode; all randomness comes from the generator given."""

    memory: MemoryModel

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Request:
        """One request that the model can serve, whatever its budget."""

    @property
    def position(self) -> int:
        """Requests drawn since the first one, where there is an order; else 0."""
        return 0

    def restart(self, position: int = 0) -> None:  # noqa: B027 - only an order needs it
        """Go back to the first request, or to another `position`; called on a seeded reset."""

    def twin(self) -> Self:
        """A sampler of the same requests with a position of its own, at the first request."""
        other = copy.copy(self)
        other.restart()
        return other

"""Samplers around another sampler: requests that repeat, and budgets that are eased at first."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rap_env.costs import request_costs
from rap_env.errors import InvalidRequestError
from rap_env.request import Request, whole
from rap_env.workload.sampler import RequestSampler

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel


@dataclass(frozen=True)
class PoolSampler(RequestSampler):
    """Uniform over a pool of requests that another sampler drew once.

    So requests repeat: a learner can compare episodes of the same request, and a baseline's
    mask is measured for each request of the pool and not for each episode.

    Attributes:
        memory: The model's byte arithmetic.
        of: Spec of the sampler that fills the pool.
        size: Requests in the pool; some may be equal.
        seed: Of the draw. The same seed gives the same pool to every lane and every run.
        requests: The pool.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A value is out of its range, or `of` is a curriculum.
        TraceError: As the inner sampler's.
    """

    memory: MemoryModel
    of: str | Mapping[str, Any] = "azure-conv"
    size: int = 256
    seed: int = 0
    requests: tuple[Request, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _at_least("size", self.size, 1)
        _at_least("seed", self.seed, 0)
        inner = _inner(self.of, self.memory)
        if isinstance(inner, CurriculumSampler):
            raise InvalidRequestError(
                "A pool of a curriculum would keep its eased budgets for ever; put the "
                "curriculum around the pool."
            )
        rng = np.random.default_rng(self.seed)
        requests = tuple(inner.sample(rng) for _ in range(self.size))
        object.__setattr__(self, "requests", requests)

    def sample(self, rng: np.random.Generator) -> Request:
        """One of `requests`."""
        return self.requests[int(rng.integers(len(self.requests)))]


@dataclass
class CurriculumSampler(RequestSampler):
    """The requests of another sampler, with budgets that are eased at first.

    The budget of draw k (from 0) is raised to at least
    ``start_fraction * (1 - k / requests)`` of the dense peak, and left alone from draw
    `requests` on. Short episodes with small losses come first, and hard ones bit by bit.

    The position is the number of draws so far. Environments that run side by side count their
    own, so with n lanes the curriculum lasts about ``n * requests`` episodes in all. A reset
    with a seed begins it anew, and a restored environment goes on where it stood.

    Attributes:
        memory: The model's byte arithmetic.
        of: Spec of the sampler whose budgets are eased.
        requests: Draws until no budget is eased any more.
        start_fraction: The first bound as a share of the dense peak, in (0, 1).

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A value is out of its range.
        TraceError: As the inner sampler's.
    """

    memory: MemoryModel
    of: str | Mapping[str, Any] = "azure-conv"
    requests: int = 2000
    start_fraction: float = 0.9
    _inner: RequestSampler = field(init=False, repr=False)
    _position: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        _at_least("requests", self.requests, 1)
        if not 0 < self.start_fraction < 1:
            raise InvalidRequestError(
                "start_fraction must be a share of the dense peak between 0 and 1, not "
                f"{self.start_fraction!r}."
            )
        self._inner = _inner(self.of, self.memory)

    @property
    def position(self) -> int:
        """Requests drawn so far."""
        return self._position

    def restart(self, position: int = 0) -> None:
        """Go on after `position` draws, with the inner sampler too."""
        self._position = position
        self._inner.restart(position)

    def twin(self) -> Self:
        """The same curriculum at its start, with an inner sampler of its own."""
        other = copy.copy(self)
        other._inner, other._position = self._inner.twin(), 0
        return other

    @property
    def bound(self) -> float:
        """Share of the dense peak that the next budget is raised to at least; 0 at the end."""
        return self.start_fraction * max(0.0, 1 - self._position / self.requests)

    def sample(self, rng: np.random.Generator) -> Request:
        """The inner sampler's next request, eased."""
        asked = self._inner.sample(rng)
        costs = request_costs(self.memory, asked.batch_size, asked.seq_len_tokens)
        eased = int(self.bound * costs.dense_peak_bytes)
        self._position += 1
        return replace(asked, budget_bytes=max(asked.budget_bytes, eased))


def _inner(spec: str | Mapping[str, Any], memory: MemoryModel) -> RequestSampler:
    from rap_env.workload import make_sampler  # which knows of the samplers here

    return make_sampler(spec, memory)


def _at_least(name: str, value: Any, least: int) -> None:
    if whole(name, value) < least:
        raise InvalidRequestError(f"{name} must be at least {least}, not {value!r}.")

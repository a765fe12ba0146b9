"""All request samplers by name, with those that draw from another sampler.

A spec names a sampler: its name alone (``"azure-conv"``), or a dict with its settings
(``{"name": "fixed", "batch_size": 8, "budget_fraction": 0.7}``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rap_env.errors import InvalidRequestError
from rap_env.request import Request, whole_number
from rap_env.specs import check_settings, split_spec
from rap_env.workload.sampler import FixedSampler, GridSampler, RequestSampler, TightSampler
from rap_env.workload.traffic import AzureCodeSampler, AzureConvSampler, TraceSampler

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel


@dataclass(frozen=True)
class PoolSampler(RequestSampler):
    """Draws uniformly from a pool of requests that another sampler drew once.

    Requests repeat, so a learner can compare episodes of the same request, and a baseline's mask
    is measured once per request of the pool instead of once per episode.

    Attributes:
        of: Spec of the sampler that fills the pool.
        size: Number of requests in the pool; some may be equal.
        seed: Seed of the draw. The same seed gives the same pool to every sub-environment and run.

    Raises:
        InvalidRequestError: A value is out of its range, or `of` is a curriculum.
    """

    memory: MemoryModel
    of: str | Mapping[str, Any] = "azure-conv"
    size: int = 256
    seed: int = 0
    requests: tuple[Request, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole_number("size", self.size, least=1)
        whole_number("seed", self.seed, least=0)
        inner = make_sampler(self.of, self.memory)
        if isinstance(inner, CurriculumSampler):
            raise InvalidRequestError(
                "A pool of a curriculum would keep its eased budgets forever; put the "
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
    """Draws the requests of another sampler, with larger budgets at first.

    The budget of draw k (from 0) is raised to at least
    ``start_fraction * (1 - k / requests)`` of the dense peak, and is unchanged from draw
    `requests` on. Short episodes with a small ΔNLL come first; hard ones follow gradually.

    The position is the number of draws so far. Sub-environments count their own draws, so with n
    of them the curriculum lasts about ``n * requests`` episodes in total. A reset with a seed
    restarts it, and a restored environment continues at its position.

    Attributes:
        of: Spec of the sampler whose budgets are eased.
        requests: Number of draws after which no budget is raised.
        start_fraction: The first bound as a share of the dense peak, in (0, 1).

    Raises:
        InvalidRequestError: A value is out of its range.
    """

    memory: MemoryModel
    of: str | Mapping[str, Any] = "azure-conv"
    requests: int = 2000
    start_fraction: float = 0.9
    _inner: RequestSampler = field(init=False, repr=False)
    _position: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        whole_number("requests", self.requests, least=1)
        if not isinstance(self.start_fraction, Real) or not 0 < self.start_fraction < 1:
            raise InvalidRequestError(
                "start_fraction must be a share of the dense peak between 0 and 1, not "
                f"{self.start_fraction!r}."
            )
        self._inner = make_sampler(self.of, self.memory)

    @property
    def position(self) -> int:
        """Requests drawn so far."""
        return self._position

    def restart(self, position: int = 0) -> None:
        """Continue after `position` draws, the inner sampler included."""
        self._position = position
        self._inner.restart(position)

    def clone(self) -> Self:
        """A copy of the curriculum at its start, with its own inner sampler."""
        other = copy.copy(self)
        other._inner, other._position = self._inner.clone(), 0
        return other

    @property
    def bound(self) -> float:
        """Least budget of the next request as a share of the dense peak; 0 at the end."""
        return self.start_fraction * max(0.0, 1 - self._position / self.requests)

    def sample(self, rng: np.random.Generator) -> Request:
        """The inner sampler's next request, with its budget raised to the bound."""
        asked = self._inner.sample(rng)
        dense = self.memory.dense_peak_bytes(asked.batch_size, asked.seq_len_tokens)
        eased = int(self.bound * dense)
        self._position += 1
        return replace(asked, budget_bytes=max(asked.budget_bytes, eased))


SAMPLERS: dict[str, type[RequestSampler]] = {
    "fixed": FixedSampler,
    "grid": GridSampler,
    "tight": TightSampler,
    "azure-conv": AzureConvSampler,
    "azure-code": AzureCodeSampler,
    "trace": TraceSampler,
    "pool": PoolSampler,
    "curriculum": CurriculumSampler,
}
"""Every sampler by its name in specs."""


def make_sampler(spec: str | Mapping[str, Any], memory: MemoryModel) -> RequestSampler:
    """Make the sampler that a spec names.

    Args:
        spec: A name of `SAMPLERS`, or a dict with that ``name`` and the sampler's settings.
        memory: The model's byte arithmetic.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A setting is out of its range.
        TraceError: The trace file of ``"trace"`` is missing, empty or malformed.
    """
    name, settings = parse_sampler(spec)
    sampler: Callable[..., RequestSampler] = SAMPLERS[name]
    return sampler(memory=memory, **settings)


def parse_sampler(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of the sampler that a spec names; their values are not checked.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: The spec is neither a name nor a dict.
    """
    name, settings = split_spec(spec, "sampler", SAMPLERS)
    known = [entry.name for entry in fields(SAMPLERS[name]) if entry.init]  # type: ignore[arg-type]
    known.remove("memory")
    check_settings(settings, f"the sampler {name!r}", known)
    return name, settings

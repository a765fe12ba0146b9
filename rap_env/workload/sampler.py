"""The interface of request samplers, and samplers of requests that are listed one by one."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Self

import numpy as np

from rap_env.errors import InvalidRequestError
from rap_env.request import Request, whole_number

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel

_DEFAULT_TOKENS = 1024
_DEFAULT_FRACTION = 0.8


class RequestSampler(ABC):
    """Draws the request of an episode; all randomness comes from the generator given.

    Attributes:
        memory: The model's byte arithmetic.
    """

    memory: MemoryModel

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Request:
        """Draw a request that the model can serve, with any budget."""

    @property
    def position(self) -> int:
        """Number of requests drawn since the first one if they have an order; else 0."""
        return 0

    def restart(self, position: int = 0) -> None:  # noqa: B027 - only an order needs it
        """Go back to the first request, or to another `position`; called on a seeded reset."""

    def clone(self) -> Self:
        """A sampler of the same requests with its own position, at the first request."""
        other = copy.copy(self)
        other.restart()
        return other


@dataclass(frozen=True)
class FixedSampler(RequestSampler):
    """Draws the same request every time.

    Attributes:
        batch_size: Number of sequences served together.
        seq_len_tokens: Tokens of each one; by default 1,024, or the model's positions if fewer.
        budget_fraction: Budget as a share of the dense peak, in (0, 1); 0.8 if neither is given.
        budget_bytes: Budget in bytes, instead of the share.

    Raises:
        InvalidRequestError: A value is out of its range, or both budgets are given.
    """

    memory: MemoryModel
    batch_size: int = 1
    seq_len_tokens: int | None = None
    budget_fraction: float | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        _one_budget(self.budget_fraction, self.budget_bytes)
        self.sample(np.random.default_rng())  # rejects impossible values now, not at a reset

    def sample(self, rng: np.random.Generator) -> Request:
        """The request."""
        length = self.seq_len_tokens
        if length is None:
            length = min(_DEFAULT_TOKENS, self.memory.facts.max_positions)
        return _request(
            self.memory, self.batch_size, length, self.budget_fraction, self.budget_bytes
        )


@dataclass(frozen=True)
class GridSampler(RequestSampler):
    """Draws uniformly from all combinations of the lists given.

    Attributes:
        batch_sizes: Numbers of sequences served together.
        seq_lens_tokens: Tokens of each sequence; by default 256, 1,024 and 4,096, cut to the
            model's positions.
        budget_fractions: Shares of the dense peak, each in (0, 1); by default 0.6 to 0.9.
        budget_bytes: Budgets in bytes, instead of the shares.

    Raises:
        InvalidRequestError: A list is empty or a value out of its range, or both kinds of
            budgets are given.
    """

    memory: MemoryModel
    batch_sizes: Sequence[int] = (1, 4, 16)
    seq_lens_tokens: Sequence[int] | None = None
    budget_fractions: Sequence[float] | None = None
    budget_bytes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _one_budget(self.budget_fractions, self.budget_bytes)
        for name in ("batch_sizes", "seq_lens_tokens", "budget_fractions", "budget_bytes"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Sequence | np.ndarray):
                raise InvalidRequestError(
                    f"{name} of the sampler 'grid' must be a list such as [{value!r}], "
                    f"not {value!r}."
                )
        if not self.requests:
            raise InvalidRequestError("Each list of the sampler 'grid' needs at least one entry.")

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """Every request of the grid; the batch size varies slowest and the budget fastest."""
        lengths = self.seq_lens_tokens
        if lengths is None:
            longest = self.memory.facts.max_positions
            lengths = sorted({min(n, longest) for n in (256, _DEFAULT_TOKENS, 4096)})
        fractions: Sequence[float | None] = self.budget_fractions or (None,)
        sizes: Sequence[int | None] = self.budget_bytes or (None,)
        if self.budget_fractions is None and self.budget_bytes is None:
            fractions = (0.6, 0.7, 0.8, 0.9)
        elif not (self.budget_fractions or self.budget_bytes):
            return ()
        shapes = itertools.product(self.batch_sizes, lengths, fractions, sizes)
        return tuple(_request(self.memory, *shape) for shape in shapes)

    def sample(self, rng: np.random.Generator) -> Request:
        """One of `requests`."""
        return self.requests[int(rng.integers(len(self.requests)))]


def _one_budget(fraction: object, size: object) -> None:
    if fraction is not None and size is not None:
        raise InvalidRequestError(
            "Give the budget as a share of the dense peak or in bytes, not both "
            f"(seen: {fraction!r} and {size!r})."
        )


def _request(
    memory: MemoryModel, batch: int, length: int, fraction: float | None, size: int | None
) -> Request:
    """A request with a budget in bytes or as a share, checked against the model."""
    memory.check(whole_number("batch_size", batch), whole_number("seq_len_tokens", length))
    if size is not None:
        return Request(batch, length, size)
    fraction = _DEFAULT_FRACTION if fraction is None else fraction
    if not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise InvalidRequestError(
            f"A budget fraction must be a number between 0 and 1, not {fraction!r}: at 1 the "
            "dense model fits and there is nothing to remove."
        )
    return Request.at_fraction(memory, batch, length, fraction)

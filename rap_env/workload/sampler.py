"""The interface of request samplers, and samplers of requests that are listed one by one."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np

from rap_env.errors import InvalidRequestError
from rap_env.ladder.items import Counts, Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.levels import LevelSpec, parse_levels
from rap_env.memory import MemoryModel
from rap_env.request import Request, whole_number
from rap_env.specs import check

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

    def sample_many(self, rngs: Sequence[np.random.Generator]) -> tuple[Counts, Counts, Counts]:
        """What `sample` draws from each of several generators, no two of them the same.

        Returns:
            Batch sizes, lengths in tokens and budgets in bytes, (n,) each.
        """
        requests = map(self.sample, rngs)
        drawn = [(r.batch_size, r.seq_len_tokens, r.budget_bytes) for r in requests]
        batch_sizes, lengths, budgets = np.array(drawn, dtype=np.int64).reshape(-1, 3).T
        return batch_sizes, lengths, budgets

    def sample_ahead(self, rng: np.random.Generator, count: int) -> tuple[Counts, Counts, Counts]:
        """What `count` calls of `sample` draw, as in `sample_many`."""
        each = [self.sample_many([rng]) for _ in range(count)]
        batch_sizes, lengths, budgets = np.array(each, dtype=np.int64).reshape(-1, 3).T
        return batch_sizes, lengths, budgets


@dataclass(frozen=True)
class FixedSampler(RequestSampler):
    """Draws the same request every time.

    Attributes:
        batch_size: Number of sequences served together.
        seq_len_tokens: Tokens of each one; by default 1,024, or the model's positions if
            fewer.
        budget_fraction: Budget as a share of the native peak, in (0, 1); 0.8 if neither is
            given.
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
        budget_fractions: Shares of the native peak, each in (0, 1); by default 0.6 to 0.9.
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
        check(self)
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


@dataclass(frozen=True)
class TightSampler(RequestSampler):
    """Draws budgets near what a model needs at its lowest levels, where no choice is free.

    Over levels, equal shares of the native peak are not equally difficult: for long requests
    half of it costs nothing, for short ones blocks must be removed. Here the budget is a
    share of the *lowered peak*: what the request needs with every item at its lowest level
    and no block removed. Below 1, blocks must be removed; above, what to lower is a choice.

    Attributes:
        max_batch_size: The batch size is a power of two up to this one, all equally likely.
        seq_len_range: Fewest and most tokens of a sequence, cut to the model's positions; the
            draw is uniform in the logarithm.
        lowered_share_range: Lowest and highest budget as shares of the lowered peak; the draw
            is uniform between them, and below the native peak.
        levels: The levels of the lowered peak, as `Ladder.of` takes them.

    Raises:
        InvalidRequestError: A value is out of its range.
        UnknownNameError: There is no such ladder or level.
    """

    memory: MemoryModel
    max_batch_size: int = 16
    seq_len_range: Sequence[int] = (128, 4096)
    lowered_share_range: Sequence[float] = (0.62, 1.4)
    levels: LevelSpec = "all"

    def __post_init__(self) -> None:
        self.memory.check(whole_number("max_batch_size", self.max_batch_size, least=1), 1)
        parse_levels(self.levels)
        check_range("seq_len_range", self.seq_len_range)
        check_range("lowered_share_range", self.lowered_share_range)

    @cached_property
    def _lowered(self) -> tuple[LadderBytes, Counts]:
        """The bytes of the levels, and the positions of the lowest that remove no block."""
        facts, levels = self.memory.facts, parse_levels(self.levels)
        ladder = Ladder.of(facts, levels if facts.kv_heads else {**levels, "caches": ()})
        lowest = [len(item.levels) - 1 - (item.levels[-1] == "removed") for item in ladder.items]
        return LadderBytes(self.memory, ladder), np.array(lowest)

    def sample(self, rng: np.random.Generator) -> Request:
        """A request with a budget near the lowered peak."""
        return Request(*(int(drawn[0]) for drawn in self.sample_many([rng])))

    def sample_many(self, rngs: Sequence[np.random.Generator]) -> tuple[Counts, Counts, Counts]:
        """Requests with budgets near the lowered peak, one from each generator."""
        batches = int(self.max_batch_size).bit_length()
        shortest, longest = (min(n, self.memory.facts.max_positions) for n in self.seq_len_range)
        logs = math.log(shortest), math.log(longest)
        draws = [(rng.integers(batches), rng.uniform(*logs)) for rng in rngs]
        batch = np.array([2 ** int(exponent) for exponent, _ in draws])
        length = np.array([round(math.exp(log)) for _, log in draws])
        ladder_bytes, positions = self._lowered
        costs = ladder_bytes.stacked(batch, length)
        most = costs.native_peak_bytes - 1
        lowered = costs.peaks(positions, np.arange(len(batch)))
        low, high = (
            np.minimum(np.rint(share * lowered).astype(np.int64), most).tolist()
            for share in self.lowered_share_range
        )
        pairs = zip(rngs, low, high, strict=True)
        return batch, length, np.array([int(rng.integers(lo, hi + 1)) for rng, lo, hi in pairs])


def check_range(name: str, bounds: Sequence[float], below: float = math.inf) -> None:
    """Check that a setting has a lowest and a highest value, in order, above 0 and `below`.

    Raises:
        InvalidRequestError: It has not.
    """
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < below:
        least = "above 0" if below == math.inf else f"above 0 and below {below:g}"
        raise InvalidRequestError(
            f"{name} must be a lowest and a highest value, both {least}, not {list(bounds)!r}."
        )


def _one_budget(fraction: object, size: object) -> None:
    if fraction is not None and size is not None:
        raise InvalidRequestError(
            "Give the budget as a share of the native peak or in bytes, not both "
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
            "native model fits and there is nothing to remove."
        )
    return Request.at_fraction(memory, batch, length, fraction)

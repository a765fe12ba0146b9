"""Requests, and the samplers that draw them.

A sampler is named by a spec: its name alone (``"azure-conv"``), or a dict with its settings
(``{"name": "fixed", "batch_size": 8, "budget_fraction": 0.7}``). `SAMPLERS` holds them all.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from rap_env.costs import request_costs
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.specs import check_settings, split_spec
from rap_env.traces import AZURE_CODE, AZURE_CONV, LengthTable, read_trace

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel

_USUAL_TOKENS = 1024
_USUAL_FRACTION = 0.8


@dataclass(frozen=True)
class Request:
    """What is to be served, and in how much memory.

    Attributes:
        batch_size: Sequences served together.
        seq_len_tokens: Tokens of each sequence, prompt and generated ones.
        budget_bytes: Bytes that the model, its cache and its workspace may take.

    Raises:
        InvalidRequestError: One of them is no whole number of at least 1.
    """

    batch_size: int
    seq_len_tokens: int
    budget_bytes: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise InvalidRequestError(
                    f"{entry.name} must be a whole number of at least 1, not {value!r}."
                )
            object.__setattr__(self, entry.name, int(value))

    @classmethod
    def at_fraction(
        cls, memory: MemoryModel, batch_size: int, seq_len_tokens: int, fraction: float
    ) -> Request:
        """A request whose budget is a fraction of the dense model's peak bytes.

        Raises:
            InvalidRequestError: The fraction is not above 0, or the batch or length does
                not suit the model.
        """
        if not 0 < fraction < float("inf"):
            raise InvalidRequestError(f"The budget fraction must be above 0, not {fraction!r}.")
        memory.check(batch_size, seq_len_tokens)
        dense = request_costs(memory, batch_size, seq_len_tokens).dense_peak_bytes
        return cls(batch_size, seq_len_tokens, max(1, int(fraction * dense)))


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


@dataclass(frozen=True)
class FixedSampler(RequestSampler):
    """Always the same request.

    Attributes:
        memory: The model's byte arithmetic.
        batch_size: Sequences served together.
        seq_len_tokens: Tokens of each; by default 1,024, or the model's positions if fewer.
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
        self.sample(np.random.default_rng())  # refuses impossible values now, not at a reset

    def sample(self, rng: np.random.Generator) -> Request:
        """The request."""
        length = self.seq_len_tokens
        if length is None:
            length = min(_USUAL_TOKENS, self.memory.facts.max_positions)
        return _request(
            self.memory, self.batch_size, length, self.budget_fraction, self.budget_bytes
        )


@dataclass(frozen=True)
class GridSampler(RequestSampler):
    """Uniform over every combination of the lists given.

    Attributes:
        memory: The model's byte arithmetic.
        batch_sizes: Sequences served together.
        seq_lens_tokens: Tokens of each; by default 256, 1,024 and 4,096, cut to the positions.
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
        if not self.requests:
            raise InvalidRequestError("Each list of the sampler 'grid' needs at least one entry.")

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """Every request of the grid, the batch size changing slowest and the budget fastest."""
        lengths = self.seq_lens_tokens
        if lengths is None:
            longest = self.memory.facts.max_positions
            lengths = sorted({min(n, longest) for n in (256, _USUAL_TOKENS, 4096)})
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


@dataclass
class TrafficSampler(RequestSampler):
    """Lengths from a service's traffic; batch sizes and budgets are drawn around them.

    A trace says how long requests are, not how many a small server would batch nor how much
    memory it has left, so both are drawn from stated ranges.

    Attributes:
        memory: The model's byte arithmetic; lengths are cut to its positions.
        max_batch_size: The batch size is a power of two up to this, each as likely.
        budget_fraction_range: Lowest and highest budget as shares of the dense peak; uniform.

    Raises:
        InvalidRequestError: A value is out of its range.
    """

    memory: MemoryModel
    max_batch_size: int = 16
    budget_fraction_range: Sequence[float] = (0.6, 0.95)

    def __post_init__(self) -> None:
        self.memory.check(_whole("max_batch_size", self.max_batch_size), 1)
        bounds = tuple(self.budget_fraction_range)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < 1:
            raise InvalidRequestError(
                "budget_fraction_range must be a lowest and a highest share of the dense peak, "
                f"both between 0 and 1, not {list(bounds)!r}."
            )

    @abstractmethod
    def draw_length(self, rng: np.random.Generator) -> int:
        """Tokens of a sequence."""

    def sample(self, rng: np.random.Generator) -> Request:
        """A request with the traffic's next length."""
        length = min(self.draw_length(rng), self.memory.facts.max_positions)
        batch = 2 ** int(rng.integers(int(self.max_batch_size).bit_length()))
        low, high = self.budget_fraction_range
        fraction = float(rng.uniform(low, high))
        return Request.at_fraction(self.memory, batch, length, fraction)


class AzureConvSampler(TrafficSampler):
    """Lengths as in the chat service of the Azure LLM inference trace 2023."""

    table: LengthTable = AZURE_CONV

    def draw_length(self, rng: np.random.Generator) -> int:
        """A length of the fitted table."""
        return self.table.sample(rng)


class AzureCodeSampler(AzureConvSampler):
    """Lengths as in the code-completion service of the Azure LLM inference trace 2023."""

    table = AZURE_CODE


@dataclass
class TraceSampler(TrafficSampler):
    """Lengths of a trace file, drawn with replacement or replayed in order.

    Attributes:
        path: A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
        order: ``"random"``, or ``"replay"``: in file order from the first, round and round.

    Raises:
        TraceError: The file is missing, empty or malformed.
        UnknownNameError: There is no such order.
        InvalidRequestError: A value is out of its range.
    """

    path: str = ""
    order: str = "random"
    _lengths: npt.NDArray[np.int64] = field(init=False, repr=False)
    _position: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("random", "replay"):
            raise UnknownNameError("order of a trace", self.order, ["random", "replay"])
        if not self.path:
            raise InvalidRequestError("The sampler 'trace' needs the setting 'path', a CSV file.")
        self._lengths = read_trace(self.path)

    @property
    def position(self) -> int:
        """Requests of the file replayed so far, those of earlier rounds included."""
        return self._position

    def restart(self, position: int = 0) -> None:
        """Let a replay go on after `position` requests, at the start with the first one."""
        self._position = position

    def draw_length(self, rng: np.random.Generator) -> int:
        """The next length of the file, or one drawn from it."""
        if self.order == "random":
            return int(rng.choice(self._lengths))
        self._position += 1
        return int(self._lengths[(self._position - 1) % len(self._lengths)])


SAMPLERS: dict[str, type[RequestSampler]] = {
    "fixed": FixedSampler,
    "grid": GridSampler,
    "azure-conv": AzureConvSampler,
    "azure-code": AzureCodeSampler,
    "trace": TraceSampler,
}
"""Every sampler by the name that a spec calls it."""


def make_sampler(spec: str | Mapping[str, Any], memory: MemoryModel) -> RequestSampler:
    """The sampler that a spec names.

    Args:
        spec: A name of `SAMPLERS`, or a dict with that ``name`` and the sampler's settings.
        memory: The model's byte arithmetic.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A setting is out of its range.
        TraceError: The trace file of ``"trace"`` is missing, empty or malformed.
    """
    name, settings = split_spec(spec, "sampler", SAMPLERS)
    sampler: Callable[..., RequestSampler] = SAMPLERS[name]
    known = [entry.name for entry in fields(SAMPLERS[name]) if entry.init]  # type: ignore[arg-type]
    known.remove("memory")
    check_settings(settings, f"the sampler {name!r}", known)
    return sampler(memory=memory, **settings)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}.")
    return int(value)


def _one_budget(fraction: object, size: object) -> None:
    if fraction is not None and size is not None:
        raise InvalidRequestError(
            "Give the budget as a share of the dense peak or in bytes, not both "
            f"(seen: {fraction!r} and {size!r})."
        )


def _request(
    memory: MemoryModel, batch: int, length: int, fraction: float | None, size: int | None
) -> Request:
    """A request with either budget, checked against the model."""
    memory.check(_whole("batch_size", batch), _whole("seq_len_tokens", length))
    if size is not None:
        return Request(batch, length, size)
    fraction = _USUAL_FRACTION if fraction is None else fraction
    if not 0 < fraction < 1:
        raise InvalidRequestError(
            f"A budget fraction must be between 0 and 1, not {fraction!r}: at 1 the dense model "
            "fits and there is nothing to remove."
        )
    return Request.at_fraction(memory, batch, length, fraction)

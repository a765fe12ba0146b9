"""Samplers that follow the request lengths of a service."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rap_env.memory import MemoryModel
from rap_env.request import Request, whole_number
from rap_env.workload.sampler import RequestSampler, check_range
from rap_env.workload.traces import AZURE_CODE, AZURE_CONV, LengthTable, read_lengths


@dataclass
class TrafficSampler(RequestSampler):
    """Takes lengths from a service's traffic; draws batch sizes and budgets from ranges.

    A trace states how long requests are, but not how many of them a small server would batch or
    how much memory it has left.

    Attributes:
        memory: The model's byte arithmetic; lengths are cut to its positions.
        max_batch_size: The batch size is a power of two up to this one, all equally likely.
        budget_fraction_range: Lowest and highest budget as shares of the dense peak; the draw is
            uniform.

    Raises:
        InvalidRequestError: A value is out of its range.
    """

    memory: MemoryModel
    max_batch_size: int = 16
    budget_fraction_range: Sequence[float] = (0.6, 0.95)

    def __post_init__(self) -> None:
        self.memory.check(whole_number("max_batch_size", self.max_batch_size), 1)
        check_range("budget_fraction_range", self.budget_fraction_range, below=1)

    @abstractmethod
    def draw_length(self, rng: np.random.Generator) -> int:
        """Draw the number of tokens of a sequence."""

    def sample(self, rng: np.random.Generator) -> Request:
        """A request with a length of the traffic."""
        length = min(self.draw_length(rng), self.memory.facts.max_positions)
        batch = 2 ** int(rng.integers(int(self.max_batch_size).bit_length()))
        low, high = self.budget_fraction_range
        fraction = float(rng.uniform(low, high))
        return Request.at_fraction(self.memory, batch, length, fraction)


class AzureConvSampler(TrafficSampler):
    """Draws lengths as in the chat service of the Azure LLM inference trace 2023."""

    table: LengthTable = AZURE_CONV

    def draw_length(self, rng: np.random.Generator) -> int:
        """A length of the fitted table."""
        return self.table.sample(rng)


class AzureCodeSampler(AzureConvSampler):
    """Draws lengths as in the code service of the Azure LLM inference trace 2023."""

    table = AZURE_CODE


@dataclass
class TraceSampler(TrafficSampler):
    """Takes lengths from a trace file, drawn with replacement.

    Attributes:
        path: A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

    Raises:
        TraceError: The file is missing, empty or malformed.
        InvalidRequestError: A value is out of its range.
    """

    path: str = ""
    _lengths: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lengths = read_lengths(self.path)

    def draw_length(self, rng: np.random.Generator) -> int:
        """A length of the file."""
        return int(rng.choice(self._lengths))

"""Samplers that follow the request lengths of a service; all request samplers by name.

The length distribution of a service has several modes (a chat service answers short questions
and long pasted texts), which no simple formula fits; a table of 44 quantiles does. The two
tables in ``azure_2023.json`` are the quantiles at `LEVELS` (NumPy's method ``nearest``) of
the Azure LLM inference trace 2023 (Patel et al., "Splitwise", ISCA 2024; CC BY 4.0).

A spec names a sampler: its name alone (``"azure-conv"``), or a dict with its settings
(``{"name": "fixed", "batch_size": 8, "budget_fraction": 0.7}``).
"""

from __future__ import annotations

import csv
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import package_json
from rap_env.errors import RapError
from rap_env.ladder.items import Counts
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.memory import MemoryModel
from rap_env.request import Request, whole_number
from rap_env.specs import check_settings, split_spec
from rap_env.workload.sampler import (
    FixedSampler,
    GridSampler,
    RequestSampler,
    TightSampler,
    check_range,
)

COLUMNS = ("ContextTokens", "GeneratedTokens")
"""Columns of a trace file in the public Azure format, which has one request per line."""

LEVELS: tuple[float, ...] = (
    0.0,
    0.01,
    *(round(0.025 * k, 3) for k in range(1, 40)),
    0.99,
    0.999,
    1.0,
)
"""Probabilities of the quantiles in a `LengthTable`: every 2.5 %, and 1, 99 and 99.9 %."""


_LEVELS = np.array(LEVELS)


class TraceError(RapError, ValueError):
    """A trace file that is missing, empty or malformed."""


@dataclass(frozen=True)
class LengthTable:
    """A distribution of sequence lengths, as its quantiles.

    Attributes:
        quantiles: Tokens of a sequence (prompt and generated) at each of `LEVELS`, ascending.
    """

    quantiles: tuple[int, ...]

    @cached_property
    def _logs(self) -> npt.NDArray[np.float64]:
        return np.asarray(np.log(np.array(self.quantiles)))

    def lengths(self, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Lengths in tokens: the quantiles at shares in [0, 1], interpolated on a log scale."""
        return np.rint(np.exp(np.interp(shares, _LEVELS, self._logs))).astype(np.int64)


def read_lengths(path: str | PathLike[str]) -> npt.NDArray[np.int64]:
    """Tokens of each request's sequence (prompt and generated), in file order, shape (requests,).

    Args:
        path: A CSV file with the columns `COLUMNS`; a leading ``~`` is the user's home.

    Raises:
        TraceError: There is no path, the file is missing, is no CSV file, lacks a column or has
            no request, or token counts are no whole numbers of at least 0 (with at least 1 in
            all).
    """
    if not str(path):
        raise TraceError(
            "The path of the trace is empty: give a CSV file with the columns "
            f"{', '.join(COLUMNS)} as workload.path."
        )
    lengths = []
    try:
        with Path(str(path)).expanduser().open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = tuple(reader.fieldnames or ())
            if not set(COLUMNS) <= set(header):
                raise TraceError(
                    f"The trace {path} needs the columns {', '.join(COLUMNS)}; its first line has "
                    f"{', '.join(header) or 'nothing'}."
                )
            for row in reader:
                lengths.append(_length(path, reader.line_num, [row[name] for name in COLUMNS]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(
            f"The trace {path} cannot be read ({error}); give a CSV file with the columns "
            f"{', '.join(COLUMNS)}."
        ) from None
    if not lengths:
        raise TraceError(f"The trace {path} has a header but no request.")
    return np.array(lengths, dtype=np.int64)


def _length(path: str | PathLike[str], line: int, values: list[str]) -> int:
    """Tokens of the sequence of a line, from its values of `COLUMNS`."""
    try:
        prompt, new = map(int, values)
    except (TypeError, ValueError):
        prompt = new = -1
    if min(prompt, new) < 0 or prompt + new < 1:
        raise TraceError(
            f"Line {line} of the trace {path} should hold two token counts, not "
            f"{values[0]!r} and {values[1]!r}; correct or remove it."
        )
    return prompt + new


_FITTED = package_json("rap_env.workload", "azure_2023.json")
AZURE_CONV = LengthTable(tuple(_FITTED["azure-conv"]))
"""Chat requests of azure_2023_conv.csv, the 13,927 requests before 18:55."""

AZURE_CODE = LengthTable(tuple(_FITTED["azure-code"]))
"""Code completion of azure_2023_code.csv, the 7,000 requests before 18:55."""


@dataclass
class TrafficSampler(RequestSampler):
    """Takes lengths from a service's traffic; draws batch sizes and budgets from ranges.

    A trace states how long requests are, but not how many of them a small server would batch
    or how much memory it has left.

    Attributes:
        memory: The model's byte arithmetic; lengths are cut to its positions.
        max_batch_size: The batch size is a power of two up to this one, all equally likely.
        budget_fraction_range: Lowest and highest budget as shares of the native peak; the draw
            is uniform.

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
    def draw(self, rng: np.random.Generator) -> float:
        """Draw what a length follows from."""

    @abstractmethod
    def lengths(self, draws: npt.NDArray[np.float64]) -> Counts:
        """The numbers of tokens of sequences, from draws, (n,) each."""

    def sample(self, rng: np.random.Generator) -> Request:
        """A request with a length of the traffic."""
        return Request(*(int(drawn[0]) for drawn in self.sample_many([rng])))

    def sample_many(self, rngs: Sequence[np.random.Generator]) -> tuple[Counts, Counts, Counts]:
        """Requests with lengths of the traffic, one from each generator."""
        batches, (low, high) = int(self.max_batch_size).bit_length(), self.budget_fraction_range
        draw = self.draw
        drawn = [(draw(rng), rng.integers(batches), rng.uniform(low, high)) for rng in rngs]
        draws, exponents, fractions = np.array(drawn, dtype=np.float64).T
        lengths = np.minimum(self.lengths(draws), self.memory.facts.max_positions)
        batch_sizes = 1 << exponents.astype(np.int64)
        costs = mask_bytes(self.memory).stacked(batch_sizes, lengths)
        budgets = fractions * costs.native_peak_bytes
        return batch_sizes, lengths, np.maximum(1, budgets.astype(np.int64))

    def sample_ahead(self, rng: np.random.Generator, count: int) -> tuple[Counts, Counts, Counts]:
        """As in `RequestSampler`; here no draw depends on the one before it."""
        return self.sample_many([rng] * count)


class AzureConvSampler(TrafficSampler):
    """Draws lengths as in the chat service of the Azure LLM inference trace 2023."""

    table: LengthTable = AZURE_CONV

    def draw(self, rng: np.random.Generator) -> float:
        """A share of the requests of the fitted table."""
        return rng.random()

    def lengths(self, draws: npt.NDArray[np.float64]) -> Counts:
        """The lengths below which these shares of the requests are."""
        return self.table.lengths(draws)


class AzureCodeSampler(AzureConvSampler):
    """Draws lengths as in the code service of the Azure LLM inference trace 2023."""

    table = AZURE_CODE


@dataclass
class TraceSampler(TrafficSampler):
    """Takes lengths from a trace file, drawn with replacement.

    Attributes:
        path: A CSV file with the columns ContextTokens and GeneratedTokens.

    Raises:
        TraceError: The file is missing, empty or malformed.
        InvalidRequestError: A value is out of its range.
    """

    path: str = ""
    _lengths: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lengths = read_lengths(self.path)

    def draw(self, rng: np.random.Generator) -> float:
        """A length of the file."""
        return float(rng.choice(self._lengths))

    def lengths(self, draws: npt.NDArray[np.float64]) -> Counts:
        """The lengths themselves."""
        return draws.astype(np.int64)


SAMPLERS: dict[str, type[RequestSampler]] = {
    "fixed": FixedSampler,
    "grid": GridSampler,
    "tight": TightSampler,
    "azure-conv": AzureConvSampler,
    "azure-code": AzureCodeSampler,
    "trace": TraceSampler,
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

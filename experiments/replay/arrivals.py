"""When requests arrive and how long they are: from a trace file, or drawn from a fitted one.

A trace of a data centre is more than a small machine can serve, so it is thinned (each k-th
request is kept), its clock is run faster, and its lengths are scaled and capped. What is left of
it keeps the trace's bursts and its mix of short and long requests.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike

import numpy as np

from rap_env.errors import UnknownNameError
from rap_env.workload.traces import (
    AZURE_CODE,
    AZURE_CONV,
    COLUMNS,
    LengthTable,
    TraceError,
    open_trace,
)

FITTED: dict[str, tuple[LengthTable, float]] = {
    "azure-conv": (AZURE_CONV, 0.149),
    "azure-code": (AZURE_CODE, 0.013),
}
"""Fitted traffic by name: lengths, and the mean share of a sequence that is generated (of the
requests before 18:55 of the Azure LLM inference trace 2023)."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace.

    Attributes:
        time_s: Seconds after the start.
        prompt_tokens: Tokens of its prompt.
        new_tokens: Tokens that are generated for it.
    """

    time_s: float
    prompt_tokens: int
    new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Thinning:
    """How a trace is made small enough.

    Attributes:
        minutes: Minutes of the trace that are taken, from its start.
        every: Each so-many-th request is kept.
        time_scale: Seconds of the trace that pass in one second of the replay.
        token_scale: Factor on the tokens of prompts, which are then at least 1.
        new_token_scale: The same for generated tokens; None for that of prompts.
        max_prompt_tokens: Longest prompt; longer ones are cut.
        max_new_tokens: Most tokens that are generated for a request.

    Raises:
        TraceError: A number is out of its range.
    """

    minutes: float = 30.0
    every: int = 1
    time_scale: float = 1.0
    token_scale: float = 1.0
    new_token_scale: float | None = None
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("minutes", "time_scale", "token_scale", "new_token_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TraceError(f"{name} of a replayed trace must be above 0, not {value!r}.")
        for name in ("every", "max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TraceError(
                    f"{name} of a replayed trace must be a whole number of at least 1, not "
                    f"{value!r}."
                )

    def apply(self, arrivals: Iterable[Arrival]) -> tuple[Arrival, ...]:
        """What is left of a trace, in order of time."""
        within = (arrival for arrival in arrivals if arrival.time_s < 60 * self.minutes)
        return tuple(
            self._scaled(arrival) for n, arrival in enumerate(within) if n % self.every == 0
        )

    def _scaled(self, arrival: Arrival) -> Arrival:
        new_scale = self.token_scale if self.new_token_scale is None else self.new_token_scale
        return Arrival(
            time_s=arrival.time_s / self.time_scale,
            prompt_tokens=_tokens(arrival.prompt_tokens * self.token_scale, self.max_prompt_tokens),
            new_tokens=_tokens(arrival.new_tokens * new_scale, self.max_new_tokens),
        )


def _tokens(scaled: float, most: int) -> int:
    return min(max(1, round(scaled)), most)


def read_arrivals(path: str | PathLike[str], thinning: Thinning) -> tuple[Arrival, ...]:
    """Arrivals of a trace file, from its first request on.

    Args:
        path: A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in order
            of time.
        thinning: How it is made small enough.

    Raises:
        TraceError: The file is missing or malformed, its times go back, or nothing is left.
    """
    with open_trace(path, COLUMNS) as reader:
        found = thinning.apply(_rows(path, reader, 60 * thinning.minutes))
    if not found:
        raise TraceError(f"The trace {path} has no request.")
    return found


def _rows(
    path: str | PathLike[str], reader: csv.DictReader[str], end_s: float
) -> Iterator[Arrival]:
    start = latest = None
    for row in reader:
        moment, arrival = _row(path, reader.line_num, row)
        start = moment if start is None else start
        if latest is not None and moment < latest:
            raise TraceError(
                f"Line {reader.line_num} of the trace {path} is earlier than the one before; sort "
                "the file by TIMESTAMP."
            )
        latest = moment
        if moment - start >= end_s:
            return
        yield Arrival(moment - start, arrival.prompt_tokens, arrival.new_tokens)


def _row(path: str | PathLike[str], line: int, row: dict[str, str]) -> tuple[float, Arrival]:
    """Seconds since 1970 and the request of one line."""
    values = [row[column] for column in COLUMNS]
    try:
        # Seven digits of a second, as Azure writes them, are one too many for Python.
        moment = datetime.fromisoformat(str(values[0]).strip()[:26])
        context, generated = int(values[1]), int(values[2])
    except (TypeError, ValueError):
        context = generated = -1
        moment = datetime.min
    if min(context, generated) < 0 or context + generated < 1:
        raise TraceError(
            f"Line {line} of the trace {path} should hold a time and two token counts, not "
            f"{', '.join(map(repr, values))}; correct or remove it."
        )
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return zoned.timestamp(), Arrival(0.0, context, generated)


def drawn_arrivals(
    name: str, arrivals_per_minute: float, thinning: Thinning, seed: int = 0
) -> tuple[Arrival, ...]:
    """Arrivals of a Poisson process with the lengths of fitted traffic.

    The share of a sequence that is generated is drawn evenly between 0 and twice its mean.

    Args:
        name: One of `FITTED`.
        arrivals_per_minute: Mean rate in the trace's own time, before it is thinned.
        thinning: How it is made small enough.
        seed: Seed of it all.

    Raises:
        UnknownNameError: There is no such traffic.
        TraceError: The rate is not above 0, or nothing arrives.
    """
    if name not in FITTED:
        raise UnknownNameError("fitted traffic", name, FITTED)
    if not 0 < arrivals_per_minute < math.inf:
        raise TraceError(f"arrivals_per_minute must be above 0, not {arrivals_per_minute!r}.")
    found = thinning.apply(_drawn(name, arrivals_per_minute, 60 * thinning.minutes, seed))
    if not found:
        raise TraceError(
            f"No request arrives in {thinning.minutes} minutes at {arrivals_per_minute} a minute; "
            "take more of either."
        )
    return found


def _drawn(name: str, arrivals_per_minute: float, end_s: float, seed: int) -> Iterator[Arrival]:
    table, generated_share = FITTED[name]
    rng = np.random.default_rng(seed)
    moment = 0.0
    while True:
        moment += float(rng.exponential(60 / arrivals_per_minute))
        tokens = table.sample(rng)
        new = round(tokens * generated_share * 2 * float(rng.random()))
        if moment >= end_s:
            return
        new = min(max(1, new), max(1, tokens - 1))
        yield Arrival(moment, max(1, tokens - new), new)

"""The workload of a replay: the moving budget, when requests arrive, and their prompts.

Arrivals come from a trace file, or are sampled with the lengths of fitted traffic. The trace
of a data center is more than a small machine can serve, so it is thinned (every k-th request
is kept), replayed faster, and its lengths are scaled and capped; bursts and the mix of short
and long requests remain. Prompts are cut from real text.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.config.study_settings import BudgetConfig, ReplayConfig
from experiments.contexts import load_text
from experiments.study.console import ExperimentError
from rap_env.artifacts import digest
from rap_env.models.live.elastic import ElasticLLM
from rap_env.workload.traffic import AZURE_CONV, COLUMNS, TraceError, trace_requests

GENERATED_SHARE = 0.149
"""Mean generated share of a sequence in the requests before 18:55 of the conversations of the
Azure LLM inference trace 2023, whose lengths `AZURE_CONV` has."""

_DRAWN_S = 24 * 3600.0  # seconds for which tenants are drawn; then the last level stays
_TENANTS_PER_DRAW = 256
_ARRIVALS_PER_MINUTE = 300.0  # without a trace, before they are thinned and replayed faster

Arrival = tuple[float, int, int]
"""One request of a trace: seconds, prompt tokens, generated tokens."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a system may use at each time, constant between changes; the last level stays.

    Attributes:
        times_s: Times of the changes in seconds from the start, ascending, the first of them
            0.
        levels_bytes: Bytes from each time on.
    """

    times_s: Sequence[float]
    levels_bytes: Sequence[int]

    def at(self, time_s: float) -> int:
        """Bytes at a time."""
        return self.between(time_s, time_s)[0]

    def between(self, start_s: float, end_s: float) -> Sequence[int]:
        """All levels from `start_s` to `end_s`, both included, in bytes."""
        first = max(0, bisect_right(self.times_s, start_s) - 1)
        return self.levels_bytes[first : max(first + 1, bisect_right(self.times_s, end_s))]

    def next_change(self, time_s: float) -> float:
        """Time of the first change after `time_s`, infinite without one."""
        index = bisect_right(self.times_s, time_s)
        return self.times_s[index] if index < len(self.times_s) else float("inf")


def cotenant_budget(settings: BudgetConfig, reference_bytes: int) -> Budget:
    """Memory that other tenants of a machine leave free.

    Tenants arrive as a Poisson process, each with one of the sizes and an exponentially
    distributed stay. Without tenants the capacity is free; a tenant that would leave less
    than the floor is rejected.

    Args:
        settings: How tenants come and go.
        reference_bytes: Bytes of the fraction 1.

    Raises:
        ExperimentError: The floor is below 1 byte or above the capacity.
    """
    unit = reference_bytes if settings.unit == "fraction" else 1
    free, least = int(settings.capacity * unit), int(settings.floor * unit)
    sizes = [int(size * unit) for size in settings.sizes]
    if not 1 <= least <= free:
        raise ExperimentError(
            "budget.floor must be from 1 byte to budget.capacity, but they are "
            f"{least:,} and {free:,} bytes."
        )
    rng = np.random.default_rng(settings.seed)
    now_s, moves = 0.0, [(0.0, 0)]
    present: list[tuple[float, int]] = []  # end and size of each tenant
    while now_s < _DRAWN_S:
        gaps = rng.exponential(60 / settings.arrivals_per_minute, _TENANTS_PER_DRAW).tolist()
        stays = rng.exponential(settings.mean_stay_s, _TENANTS_PER_DRAW).tolist()
        drawn = rng.choice(sizes, _TENANTS_PER_DRAW).tolist()
        for gap_s, stay_s, size in zip(gaps, stays, drawn, strict=True):
            now_s += gap_s
            present = [tenant for tenant in present if tenant[0] > now_s]
            if free - sum(used for _, used in present) - size >= least:
                present.append((now_s + stay_s, size))
                moves += [(now_s, size), (now_s + stay_s, -size)]
    moves.sort()
    used_bytes = itertools.accumulate(size for _, size in moves)
    return Budget([time_s for time_s, _ in moves], [free - used for used in used_bytes])


@dataclass(frozen=True)
class ReplayRequest:
    """One request of the replay; `time_s` is its arrival, in seconds of the replay."""

    time_s: float
    prompt_ids: tuple[int, ...]
    new_tokens: int


def make_requests(config: Config, llm: ElasticLLM) -> tuple[list[ReplayRequest], dict[str, Any]]:
    """Make the requests of a replay, in order of arrival; equal settings give equal requests.

    Returns:
        The requests, and their provenance.

    Raises:
        TraceError: The trace is missing, malformed or empty.
        CorpusError: The text is missing or malformed.
    """
    settings = config.replay
    arrivals = read_arrivals(settings, config.seed)
    text = load_text(settings.text, "report", llm, progress=config.progress)
    stream = np.asarray(text.tokens.flatten())
    rng = np.random.default_rng([config.seed, 1])
    requests = []
    for time_s, prompt_tokens, new_tokens in arrivals:
        start = int(rng.integers(len(stream)))
        prompt_ids = np.take(stream, range(start, start + prompt_tokens), mode="wrap").tolist()
        requests.append(ReplayRequest(time_s, tuple(prompt_ids), new_tokens))
    return requests, {
        "trace": Path(settings.trace).name if settings.trace else "fitted azure-conv",
        "last_arrival_s": round(requests[-1].time_s, 3),
        "prompt_tokens_mean": round(float(np.mean([len(r.prompt_ids) for r in requests])), 1),
        "new_tokens_mean": round(float(np.mean([r.new_tokens for r in requests])), 1),
        "text": text.provenance,
        "sha256": digest([[r.time_s, list(r.prompt_ids), r.new_tokens] for r in requests]),
    }


def read_arrivals(settings: ReplayConfig, seed: int) -> list[Arrival]:
    """Read or sample arrivals, and reduce them to what one machine can serve.

    Raises:
        TraceError: The trace is missing or malformed, or no request arrives.
    """
    trace = settings.trace
    arrivals = _sampled(seed) if trace is None else _traced(trace)
    in_time = itertools.takewhile(lambda arrival: arrival[0] < 60 * settings.minutes, arrivals)
    kept = [
        (
            time_s / settings.time_scale,
            min(max(1, round(prompt * settings.token_scale)), settings.max_prompt_tokens),
            min(max(1, round(new * settings.token_scale)), settings.max_new_tokens),
        )
        for time_s, prompt, new in itertools.islice(in_time, None, None, settings.every)
    ]
    if not kept:
        raise TraceError(
            f"No request arrives in {settings.minutes:g} minutes; give a trace with requests, or "
            "raise replay.minutes."
        )
    return kept


def _traced(path: str) -> Iterator[Arrival]:
    """The arrivals of a trace file, counted from the first one."""
    rows: list[Arrival] = []
    for line, row, prompt_tokens, new_tokens in trace_requests(path, COLUMNS):
        try:
            # Azure writes seven digits of a second; Python reads at most six.
            moment = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        except ValueError:
            raise TraceError(
                f"Line {line} of the trace {path} must hold a time such as 2023-11-16 18:17:03, "
                f"not {row['TIMESTAMP']!r}; correct or remove the line."
            ) from None
        time_s = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        rows.append((time_s, prompt_tokens, new_tokens))
    rows.sort(key=lambda row: row[0])
    return ((time_s - rows[0][0], prompt, new) for time_s, prompt, new in rows)


def _sampled(seed: int) -> Iterator[Arrival]:
    """Arrivals of a Poisson process, whose generated share is uniform from 0 to twice its mean."""
    rng = np.random.default_rng(seed)
    moment = 0.0
    while True:
        moment += float(rng.exponential(60 / _ARRIVALS_PER_MINUTE))
        tokens = AZURE_CONV.sample(rng)
        new = round(tokens * GENERATED_SHARE * 2 * float(rng.random()))
        new = min(max(1, new), max(1, tokens - 1))
        yield moment, max(1, tokens - new), new

"""The workload of a replay: when requests arrive, how long they are, and their prompts.

Arrivals come from a trace file or are sampled from fitted traffic. A data center's trace is more
than a small machine can serve, so it is thinned (every k-th request is kept), replayed faster, and
its lengths are scaled and capped; bursts and the mix of short and long requests remain. Prompts
are cut from real text; some have a known answer.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.config.serving import ReplayConfig
from experiments.errors import ExperimentError
from rap_env.artifacts import digest
from rap_env.errors import UnknownNameError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.generated_tasks import generated_task
from rap_env.scoring.local_data import TASK_FIELDS, read_rows
from rap_env.workload.traces import (
    AZURE_CODE,
    AZURE_CONV,
    COLUMNS,
    LengthTable,
    TraceError,
    open_trace,
)

FITTED_TRAFFIC: dict[str, tuple[LengthTable, float]] = {
    "azure-conv": (AZURE_CONV, 0.149),
    "azure-code": (AZURE_CODE, 0.013),
}
"""Fitted traffic by name: total lengths, and the mean generated share of a sequence (fitted to the
requests before 18:55 of the Azure LLM inference trace 2023)."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    time_s: float
    prompt_tokens: int
    new_tokens: int


def thinned(arrivals: Iterable[Arrival], settings: ReplayConfig) -> tuple[Arrival, ...]:
    """Reduce a trace to what one machine can serve, in order of arrival.

    Args:
        arrivals: The trace, in order of time.
        settings: Minutes of the trace, which requests are kept, and the scales and caps of times
            and tokens.
    """
    new_scale = settings.new_token_scale or settings.token_scale
    within = (arrival for arrival in arrivals if arrival.time_s < 60 * settings.minutes)
    return tuple(
        Arrival(
            time_s=arrival.time_s / settings.time_scale,
            prompt_tokens=_tokens(
                arrival.prompt_tokens * settings.token_scale, settings.max_prompt_tokens
            ),
            new_tokens=_tokens(arrival.new_tokens * new_scale, settings.max_new_tokens),
        )
        for number, arrival in enumerate(within)
        if number % settings.every == 0
    )


def _tokens(scaled: float, most: int) -> int:
    return min(max(1, round(scaled)), most)


def read_arrivals(path: str | PathLike[str], settings: ReplayConfig) -> tuple[Arrival, ...]:
    """Read the arrivals of a trace file, counted from its first request.

    Args:
        path: A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in order
            of time.
        settings: How the trace is reduced; see `thinned`.

    Raises:
        TraceError: The file is missing or malformed, its times decrease, or no request is left.
    """
    with open_trace(path, COLUMNS) as reader:
        found = thinned(_rows(path, reader, 60 * settings.minutes), settings)
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
                f"Line {reader.line_num} of the trace {path} is earlier than the previous line; "
                "sort the file by TIMESTAMP."
            )
        latest = moment
        if moment - start >= end_s:
            return
        yield Arrival(moment - start, arrival.prompt_tokens, arrival.new_tokens)


def _row(path: str | PathLike[str], line: int, row: dict[str, str]) -> tuple[float, Arrival]:
    """Parse one line: seconds since 1970, and the request."""
    values = [row[column] for column in COLUMNS]
    try:
        # Azure writes seven digits of a second; Python reads at most six.
        moment = datetime.fromisoformat(str(values[0]).strip()[:26])
        context, generated = int(values[1]), int(values[2])
    except (TypeError, ValueError):
        context = generated = -1
        moment = datetime.min
    if min(context, generated) < 0 or context + generated < 1:
        raise TraceError(
            f"Line {line} of the trace {path} must hold a time and two token counts, not "
            f"{', '.join(map(repr, values))}; correct or remove the line."
        )
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return zoned.timestamp(), Arrival(0.0, context, generated)


def sample_arrivals(
    name: str, arrivals_per_minute: float, settings: ReplayConfig, seed: int = 0
) -> tuple[Arrival, ...]:
    """Sample arrivals of a Poisson process with the lengths of fitted traffic.

    The generated share of a sequence is uniform between 0 and twice its mean.

    Args:
        name: One of `FITTED_TRAFFIC`.
        arrivals_per_minute: Mean rate in the trace's own time, before it is thinned.
        settings: How the trace is reduced; see `thinned`.
        seed: Seed of times and lengths.

    Raises:
        UnknownNameError: No traffic has this name.
        TraceError: The rate is not above 0, or no request arrives.
    """
    if name not in FITTED_TRAFFIC:
        raise UnknownNameError("fitted traffic", name, FITTED_TRAFFIC)
    if not 0 < arrivals_per_minute < math.inf:
        raise TraceError(f"arrivals_per_minute must be above 0, not {arrivals_per_minute!r}.")
    found = thinned(_sample(name, arrivals_per_minute, 60 * settings.minutes, seed), settings)
    if not found:
        raise TraceError(
            f"No request arrives in {settings.minutes} minutes at {arrivals_per_minute} a minute; "
            "increase either."
        )
    return found


def _sample(name: str, arrivals_per_minute: float, end_s: float, seed: int) -> Iterator[Arrival]:
    table, generated_share = FITTED_TRAFFIC[name]
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


Known = tuple[str, str]
"""A prompt and the words that should follow it."""


@dataclass(frozen=True)
class ReplayRequest:
    """One request of the replay.

    Attributes:
        time_s: Arrival, in seconds of the replay.
        answer: Text that a correct answer begins with; None if unknown.
    """

    number: int
    time_s: float
    prompt_ids: tuple[int, ...]
    new_tokens: int
    answer: str | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_ids) + self.new_tokens


@dataclass(frozen=True)
class Workload:
    """All requests of a replay, in order of arrival, and their provenance."""

    requests: tuple[ReplayRequest, ...]
    provenance: dict[str, Any]

    @property
    def longest_tokens(self) -> int:
        """Prompt and generated tokens of the longest request."""
        return max(request.total_tokens for request in self.requests)

    @property
    def last_s(self) -> float:
        """Arrival of the last request, in seconds of the replay."""
        return self.requests[-1].time_s


def make_workload(config: Config, llm: ElasticLLM) -> Workload:
    """Make the requests of a replay; equal settings give equal requests.

    Raises:
        ExperimentError: The model has no tokenizer, or too few positions for the longest request.
        TraceError: The trace is missing, malformed or empty.
        CorpusError: The text or the data of the known answers is missing or malformed.
    """
    settings = config.replay
    if llm.tokenizer is None:
        raise ExperimentError(f"{llm.name} has no tokenizer, which a replay needs for its prompts.")
    if settings.trace is not None:
        arrivals = read_arrivals(settings.trace, settings)
    else:
        rate = settings.arrivals_per_minute
        arrivals = sample_arrivals(settings.traffic, rate, settings, config.seed)
    text = CorpusConfig(**asdict(settings.text), role="report")
    corpus = load_corpus(text, llm, progress=config.progress)
    stream = np.asarray(corpus.tokens.flatten())
    rng = np.random.default_rng([config.seed, 1])
    count = round(settings.known_share * len(arrivals))
    with_answer = rng.permutation(len(arrivals))[:count].tolist()
    known = dict(zip(with_answer, known_answers(settings, count, config.seed), strict=True))
    requests = []
    for number, arrival in enumerate(arrivals):
        start = int(rng.integers(len(stream)))
        if number in known:
            requests.append(_with_answer(number, arrival, known[number], settings, llm.tokenizer))
        else:
            ids = np.take(stream, range(start, start + arrival.prompt_tokens), mode="wrap")
            prompt = tuple(ids.tolist())
            requests.append(ReplayRequest(number, arrival.time_s, prompt, arrival.new_tokens))
    workload = Workload(tuple(requests), _provenance(settings, requests, corpus.provenance))
    if workload.longest_tokens > llm.facts.max_positions:
        raise ExperimentError(
            f"The longest request of the replay has {workload.longest_tokens} tokens, but "
            f"{llm.name} accepts {llm.facts.max_positions}; lower replay.max_prompt_tokens or "
            "replay.max_new_tokens."
        )
    return workload


def known_answers(settings: ReplayConfig, count: int, seed: int) -> list[Known]:
    """Return prompts with a known continuation.

    Raises:
        CorpusError: The data of the task is missing or malformed.
        ExperimentError: The task has fewer than `count` such prompts.
    """
    if not count:
        return []
    if settings.known_task == "lambada_openai":
        found = _last_words(Path(str(settings.data_root)).expanduser())
    else:
        documents = generated_task(settings.known_task).documents(seed, count)
        found = [(d["context"], d["choices"][d["gold"]].strip()) for d in documents]
    if len(found) < count:
        raise ExperimentError(
            f"{settings.known_task} has {len(found)} prompts with a known answer, but the replay "
            f"asks for {count}; lower replay.known_share."
        )
    chosen = np.random.default_rng([seed, 2]).permutation(len(found))[:count]
    return [found[place] for place in chosen.tolist()]


def is_correct(answer: str, generated: str) -> bool:
    """Whether a generated text begins with the answer, as whole words."""
    return bool(re.match(rf"{re.escape(answer)}(?!\w)", generated.strip()))


def _with_answer(
    number: int, arrival: Arrival, known: Known, settings: ReplayConfig, tokenizer: Any
) -> ReplayRequest:
    """Make a request with a known answer; a prompt that is too long loses its beginning."""
    context, answer = known
    ids = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    needed = len(tokenizer(f" {answer}", add_special_tokens=False, verbose=False)["input_ids"])
    prompt = tuple(map(int, ids[-settings.max_prompt_tokens :]))
    # One more token shows that the last word of the answer ends there.
    return ReplayRequest(
        number, arrival.time_s, prompt, max(arrival.new_tokens, needed + 1), answer
    )


def _last_words(root: Path) -> list[Known]:
    path = root / "lambada_openai" / "test.jsonl"
    rows = read_rows(path, TASK_FIELDS["lambada_openai"])
    parts = [str(row["text"]).rstrip().rpartition(" ") for row in rows]
    return [(context, word) for context, _, word in parts if context and word]


def _provenance(
    settings: ReplayConfig, requests: list[ReplayRequest], text: dict[str, Any]
) -> dict[str, Any]:
    """Describe the requests; a trace is named by its file name, without its folder."""
    prompts = [len(request.prompt_ids) for request in requests]
    new = [request.new_tokens for request in requests]
    return {
        "trace": Path(settings.trace).name if settings.trace else f"fitted {settings.traffic}",
        "requests": len(requests),
        "last_arrival_s": round(requests[-1].time_s, 3),
        "prompt_tokens_mean": round(float(np.mean(prompts)), 1),
        "new_tokens_mean": round(float(np.mean(new)), 1),
        "known_task": settings.known_task if settings.known_share else None,
        "known_answers": sum(request.answer is not None for request in requests),
        "text": text,
        "sha256": digest([[r.time_s, list(r.prompt_ids), r.new_tokens] for r in requests]),
    }

"""The workload of a replay: when requests arrive, how long they are, and their prompts.

Arrivals come from a trace file, or are sampled with the lengths of fitted traffic. The trace of a
data center is more than a small machine can serve, so it is thinned (every k-th request is kept),
replayed faster, and its lengths are scaled and capped; bursts and the mix of short and long
requests remain. Prompts are cut from real text; some have a known answer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.config.replay_settings import ReplayConfig
from experiments.study.experiment_errors import ExperimentError
from rap_env.artifacts import digest
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.generated_tasks import GENERATED_TASKS
from rap_env.scoring.lm_eval_tasks import TASK_FIELDS, read_rows
from rap_env.workload.traces import AZURE_CONV, COLUMNS, TraceError, trace_requests

GENERATED_SHARE = 0.149
"""Mean generated share of a sequence in the requests before 18:55 of the conversations of the Azure
LLM inference trace 2023, whose lengths `AZURE_CONV` has."""

Arrival = tuple[float, int, int]
"""One request of a trace: seconds, prompt tokens, generated tokens."""

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
        arrivals = sample_arrivals(settings, config.seed)
    text = CorpusConfig(**asdict(settings.text), role="report")
    corpus = load_corpus(text, llm, progress=config.progress)
    stream = np.asarray(corpus.tokens.flatten())
    rng = np.random.default_rng([config.seed, 1])
    count = round(settings.known_share * len(arrivals))
    with_answer = rng.permutation(len(arrivals))[:count].tolist()
    known = dict(zip(with_answer, known_answers(settings, count, config.seed), strict=True))
    requests = []
    for number, (time_s, prompt_tokens, new_tokens) in enumerate(arrivals):
        start, answer = int(rng.integers(len(stream))), None
        if number in known:
            context, answer = known[number]
            prompt_ids = _encode(llm, context)[-settings.max_prompt_tokens :]
            # One more token shows that the last word of the answer ends there.
            new_tokens = max(new_tokens, len(_encode(llm, f" {answer}")) + 1)
        else:
            places = range(start, start + prompt_tokens)
            prompt_ids = np.take(stream, places, mode="wrap").tolist()
        requests.append(ReplayRequest(number, time_s, tuple(prompt_ids), new_tokens, answer))
    workload = Workload(tuple(requests), _provenance(settings, requests, corpus.provenance))
    if workload.longest_tokens > llm.facts.max_positions:
        raise ExperimentError(
            f"The longest request of the replay has {workload.longest_tokens} tokens, but "
            f"{llm.name} accepts {llm.facts.max_positions}; lower replay.max_prompt_tokens or "
            "replay.max_new_tokens."
        )
    return workload


def read_arrivals(path: str | PathLike[str], settings: ReplayConfig) -> list[Arrival]:
    """Read the arrivals of a trace file, counted from its first request, and thin them.

    Args:
        path: A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in order
            of time.
        settings: How the trace is reduced.

    Raises:
        TraceError: The file is missing or malformed, its times decrease, or no request is left.
    """
    rows: list[Arrival] = []
    for line, row, prompt_tokens, new_tokens in trace_requests(path, COLUMNS):
        try:
            # Azure writes seven digits of a second; Python reads at most six.
            moment = datetime.fromisoformat(str(row["TIMESTAMP"]).strip()[:26])
        except ValueError:
            raise TraceError(
                f"Line {line} of the trace {path} must hold a time such as 2023-11-16 18:17:03, "
                f"not {row['TIMESTAMP']!r}; correct or remove the line."
            ) from None
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        rows.append((zoned.timestamp(), prompt_tokens, new_tokens))
        if len(rows) > 1 and rows[-1][0] < rows[-2][0]:
            raise TraceError(
                f"Line {line} of the trace {path} is earlier than the previous line; sort the "
                "file by TIMESTAMP."
            )
    counted = ((time_s - rows[0][0], prompt, new) for time_s, prompt, new in rows)
    return thinned(counted, settings)


def sample_arrivals(settings: ReplayConfig, seed: int = 0) -> list[Arrival]:
    """Sample arrivals of a Poisson process with the lengths of fitted traffic, and thin them.

    The generated share of a sequence is uniform between 0 and twice its mean.

    Raises:
        TraceError: No request arrives.
    """
    return thinned(_sample(settings, seed), settings)


def _sample(settings: ReplayConfig, seed: int) -> Iterator[Arrival]:
    rng = np.random.default_rng(seed)
    moment = 0.0
    while moment < 60 * settings.minutes:
        moment += float(rng.exponential(60 / settings.arrivals_per_minute))
        tokens = AZURE_CONV.sample(rng)
        new = round(tokens * GENERATED_SHARE * 2 * float(rng.random()))
        new = min(max(1, new), max(1, tokens - 1))
        yield moment, max(1, tokens - new), new


def thinned(arrivals: Iterable[Arrival], settings: ReplayConfig) -> list[Arrival]:
    """Reduce arrivals, in order of time, to what one machine can serve.

    Raises:
        TraceError: No request is left.
    """
    in_time = itertools.takewhile(lambda row: row[0] < 60 * settings.minutes, arrivals)
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
            "raise replay.minutes or replay.arrivals_per_minute."
        )
    return kept


def known_answers(settings: ReplayConfig, count: int, seed: int) -> list[Known]:
    """Return prompts with a known continuation: of LAMBADA, or of generated lists.

    Raises:
        CorpusError: LAMBADA is missing or malformed.
        ExperimentError: It has fewer than `count` such prompts.
    """
    if not count:
        return []
    if settings.data_root is not None:
        path = Path(settings.data_root).expanduser() / "lambada_openai" / "test.jsonl"
        rows = read_rows(path, TASK_FIELDS["lambada_openai"])
        parts = [str(row["text"]).rstrip().rpartition(" ") for row in rows]
        pairs = [(context, word) for context, _, word in parts if context and word]
    else:
        documents = GENERATED_TASKS["rap_recall"].documents(seed, count)
        pairs = [(d["context"], d["choices"][d["gold"]].strip()) for d in documents]
    if len(pairs) < count:
        raise ExperimentError(
            f"There are {len(pairs)} prompts with a known answer, but the replay asks for {count}; "
            "lower replay.known_share."
        )
    chosen = np.random.default_rng([seed, 2]).permutation(len(pairs))[:count]
    return [pairs[place] for place in chosen.tolist()]


def is_correct(answer: str, generated: str) -> bool:
    """Whether a generated text begins with the answer, as whole words."""
    return bool(re.match(rf"{re.escape(answer)}(?!\w)", generated.strip()))


def _encode(llm: ElasticLLM, text: str) -> list[int]:
    ids = llm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(map(int, ids))


def _provenance(
    settings: ReplayConfig, requests: list[ReplayRequest], text: dict[str, Any]
) -> dict[str, Any]:
    """Describe the requests; a trace is named by its file name, without its folder."""
    return {
        "trace": Path(settings.trace).name if settings.trace else "fitted azure-conv",
        "last_arrival_s": round(requests[-1].time_s, 3),
        "prompt_tokens_mean": round(float(np.mean([len(r.prompt_ids) for r in requests])), 1),
        "new_tokens_mean": round(float(np.mean([r.new_tokens for r in requests])), 1),
        "known_answers": sum(request.answer is not None for request in requests),
        "text": text,
        "sha256": digest([[r.time_s, list(r.prompt_ids), r.new_tokens] for r in requests]),
    }

"""What is asked in a replay: arrivals with prompts of real text, some with a known answer."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config, ReplayConfig
from experiments.errors import ExperimentError
from experiments.replay.arrivals import Arrival, Thinning, drawn_arrivals, read_arrivals
from rap_env.artifacts import digest
from rap_env.llm.elastic import ElasticLLM
from rap_env.scoring.corpus import CorpusConfig, load_corpus
from rap_env.scoring.generated_tasks import generated_task
from rap_env.scoring.local_data import TASK_FIELDS, read_rows

Known = tuple[str, str]
"""A prompt and the words that should follow it."""


@dataclass(frozen=True)
class Asked:
    """One request of the replay.

    Attributes:
        number: Its place in order of arrival.
        time_s: When it arrives, in seconds of the replay.
        prompt_ids: Tokens of its prompt.
        new_tokens: Tokens to generate.
        answer: What should be generated first; None where nothing is known.
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
class Load:
    """All requests of a replay, in order of arrival, and where they came from."""

    requests: tuple[Asked, ...]
    provenance: dict[str, Any]

    @property
    def longest_tokens(self) -> int:
        """Prompt and generated tokens of the longest request."""
        return max(asked.total_tokens for asked in self.requests)

    @property
    def last_s(self) -> float:
        """When the last request arrives."""
        return self.requests[-1].time_s


def make_load(config: Config, llm: ElasticLLM) -> Load:
    """The requests of a replay; the same settings give the same ones.

    Raises:
        ExperimentError: The model has no tokenizer, or too few positions for the longest request.
        TraceError: The trace is missing, malformed or empty.
        CorpusError: The text or the data of the known answers is missing or malformed.
    """
    settings = config.replay
    if llm.tokenizer is None:
        raise ExperimentError(f"{llm.name} has no tokenizer to read prompts with.")
    arrivals = _arrivals(settings, config.seed)
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
            requests.append(Asked(number, arrival.time_s, prompt, arrival.new_tokens))
    load = Load(tuple(requests), _provenance(settings, requests, corpus.provenance))
    if load.longest_tokens > llm.facts.max_positions:
        raise ExperimentError(
            f"The longest request of the replay has {load.longest_tokens} tokens, but {llm.name} "
            f"accepts {llm.facts.max_positions}; lower replay.max_prompt_tokens or "
            "replay.max_new_tokens."
        )
    return load


def known_answers(settings: ReplayConfig, count: int, seed: int) -> list[Known]:
    """Prompts whose continuation is known.

    Raises:
        CorpusError: The data of the task is missing or malformed.
        ExperimentError: It has fewer than `count` of them.
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


def is_right(answer: str, generated: str) -> bool:
    """Whether a generated text begins with the answer, as whole words."""
    return bool(re.match(rf"{re.escape(answer)}(?!\w)", generated.strip()))


def _arrivals(settings: ReplayConfig, seed: int) -> tuple[Arrival, ...]:
    names = ("minutes", "every", "time_scale", "token_scale", "new_token_scale",
             "max_prompt_tokens", "max_new_tokens")  # fmt: skip
    thinning = Thinning(**{name: getattr(settings, name) for name in names})
    if settings.trace is not None:
        return read_arrivals(settings.trace, thinning)
    return drawn_arrivals(settings.traffic, settings.arrivals_per_minute, thinning, seed)


def _with_answer(
    number: int, arrival: Arrival, known: Known, settings: ReplayConfig, tokenizer: Any
) -> Asked:
    """A request that asks for a known answer; its prompt is as long as it is, its end kept."""
    context, answer = known
    ids = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    needed = len(tokenizer(f" {answer}", add_special_tokens=False, verbose=False)["input_ids"])
    prompt = tuple(map(int, ids[-settings.max_prompt_tokens :]))
    # One token more shows that the answer's last word ends where it should.
    return Asked(number, arrival.time_s, prompt, max(arrival.new_tokens, needed + 1), answer)


def _last_words(root: Path) -> list[Known]:
    path = root / "lambada_openai" / "test.jsonl"
    rows = read_rows(path, TASK_FIELDS["lambada_openai"])
    parts = [str(row["text"]).rstrip().rpartition(" ") for row in rows]
    return [(context, word) for context, _, word in parts if context and word]


def _provenance(
    settings: ReplayConfig, requests: list[Asked], text: dict[str, Any]
) -> dict[str, Any]:
    """Where the requests came from; a trace is named by its file alone."""
    prompts = [len(asked.prompt_ids) for asked in requests]
    new = [asked.new_tokens for asked in requests]
    return {
        "trace": Path(settings.trace).name if settings.trace else f"fitted {settings.traffic}",
        "requests": len(requests),
        "last_arrival_s": round(requests[-1].time_s, 3),
        "prompt_tokens_mean": round(float(np.mean(prompts)), 1),
        "new_tokens_mean": round(float(np.mean(new)), 1),
        "known_task": settings.known_task if settings.known_share else None,
        "known_answers": sum(asked.answer is not None for asked in requests),
        "text": text,
        "sha256": digest([[a.time_s, list(a.prompt_ids), a.new_tokens] for a in requests]),
    }

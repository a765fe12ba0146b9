"""The workload of a replay: the moving budget, when requests arrive, and their prompts.

Arrivals come from a trace file, or are sampled with the lengths of fitted traffic. The trace
of a data center is more than a small machine can serve, so it is thinned (every k-th request
is kept), replayed faster, and its lengths are scaled and capped; bursts and the mix of short
and long requests remain. Prompts are cut from real text.

Conversations are drawn from a seed, or are those of a trace with the hashes of the blocks of
its prompts: blocks with equal hashes have equal tokens.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.config.study_settings import BudgetConfig, ConversationsConfig, ReplayConfig
from experiments.contexts import load_text
from experiments.study.console import ExperimentError
from rap_env.artifacts import digest
from rap_env.models.live.elastic import ElasticLLM
from rap_env.runtime.sampling import SamplingParams
from rap_env.workload.traffic import AZURE_CONV, COLUMNS, TraceError, trace_requests

GENERATED_SHARE = 0.149
"""Mean generated share of a sequence in the requests before 18:55 of the conversations of the
Azure LLM inference trace 2023, whose lengths `AZURE_CONV` has."""

_DRAWN_S = 24 * 3600.0  # seconds for which tenants are drawn; then the last level stays
_TENANTS_PER_DRAW = 256
_ARRIVALS_PER_MINUTE = 300.0  # without a trace, before they are thinned and replayed faster
_BLOCK_TOKENS = 512  # of a prompt, which have one hash in a trace
_PREFIXES = ("OffsetMs", *COLUMNS[1:], "PrefixBlocks")

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

    @property
    def params(self) -> SamplingParams:
        """How its answer is sampled."""
        return SamplingParams(max_new_tokens=self.new_tokens)

    def following(self, answer_ids: Sequence[int], time_s: float) -> ReplayRequest | None:
        """The request that an answer causes which ended at a time; None for none."""
        return None


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
    stream = text.tokens.flatten().tolist()
    rng = np.random.default_rng([config.seed, 1])
    requests = []
    for time_s, prompt_tokens, new_tokens in arrivals:
        start = int(rng.integers(len(stream)))
        requests.append(ReplayRequest(time_s, cut(stream, start, prompt_tokens), new_tokens))
    return requests, {
        "trace": Path(settings.trace).name if settings.trace else "fitted azure-conv",
        "last_arrival_s": round(requests[-1].time_s, 3),
        "prompt_tokens_mean": round(float(np.mean([len(r.prompt_ids) for r in requests])), 1),
        "new_tokens_mean": round(float(np.mean([r.new_tokens for r in requests])), 1),
        "text": text.provenance,
        "sha256": digest([[r.time_s, list(r.prompt_ids), r.new_tokens] for r in requests]),
    }


def cut(text: Sequence[int], start: int, tokens: int) -> tuple[int, ...]:
    """So many tokens of a text from a place on; its end is followed by its beginning."""
    return tuple(text[place % len(text)] for place in range(start, start + tokens))


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
        tokens = int(AZURE_CONV.lengths(np.array([rng.random()]))[0])
        new = round(tokens * GENERATED_SHARE * 2 * float(rng.random()))
        new = min(max(1, new), max(1, tokens - 1))
        yield moment, max(1, tokens - new), new


# Conversations


@dataclass(frozen=True)
class Turn(ReplayRequest):
    """A turn of a conversation.

    Attributes:
        turn: Its number, from 0.
        again: Whether the answer to the last prompt is generated once more, with a seed.
        later: The turns after it: their times are seconds from an answer to the next message,
            and their prompts are the messages alone.
    """

    turn: int
    again: bool = False
    later: tuple[Turn, ...] = ()

    @property
    def params(self) -> SamplingParams:
        """How its answer is sampled."""
        params = super().params
        return replace(params, temperature=1.0, seed=self.turn) if self.again else params

    @property
    def all_tokens(self) -> int:
        """Tokens of this and all later messages and answers."""
        return sum(len(turn.prompt_ids) + turn.new_tokens for turn in (self, *self.later))

    def following(self, answer_ids: Sequence[int], time_s: float) -> Turn | None:
        """The next turn after an answer that ended at a time, with all before it as its prompt."""
        if not self.later:
            return None
        turn, *later = self.later
        added = () if turn.again else (*answer_ids, *turn.prompt_ids)
        prompt_ids = self.prompt_ids + added
        return replace(turn, time_s=time_s + turn.time_s, prompt_ids=prompt_ids, later=tuple(later))


def draw_conversations(
    settings: ConversationsConfig, text: Sequence[int], seed: int
) -> tuple[list[Turn], int]:
    """Draw conversations from a seed; messages are cut from a text.

    Returns:
        The first turn of each in order of arrival, and the tokens of all conversations, in
        which those of the system prompt count once.
    """
    rng = np.random.default_rng([seed, 2])

    def about(mean: int) -> int:
        return 1 + int(rng.poisson(mean - 1))

    def part(tokens: int) -> tuple[int, ...]:
        return cut(text, int(rng.integers(len(text))), tokens)

    system_ids, first = part(settings.system_tokens), list[Turn]()
    for _ in range(settings.conversations):
        turns = list[Turn]()
        for number in range(about(settings.turns)):
            message_ids = part(about(settings.message_tokens))
            think_s = rng.exponential(settings.think_s, 2).tolist()
            turn = Turn(think_s[0], message_ids, about(settings.answer_tokens), number)
            turns.append(turn)
            if rng.random() < settings.again_share:
                turns.append(replace(turn, time_s=think_s[1], prompt_ids=(), again=True))
        prompt_ids = system_ids + turns[0].prompt_ids
        first.append(replace(turns[0], prompt_ids=prompt_ids, later=tuple(turns[1:])))
    first.sort(key=lambda turn: turn.time_s)
    own_tokens = sum(turn.all_tokens - len(system_ids) for turn in first)
    return first, len(system_ids) + own_tokens


def prefix_requests(
    settings: ReplayConfig, text: Sequence[int], seed: int
) -> tuple[list[Turn], int]:
    """Read the requests of a trace that has the hashes of the blocks of its prompts.

    A block is the part of a text that its hash and the seed draw. All prompts of a trace begin
    with one block; those with the same second one are a conversation. One conversation out of
    `settings.every` is kept. Prompts longer than `settings.max_prompt_tokens` are left out,
    since those of a conversation would become equal if they were cut.

    Returns:
        The requests in order of arrival, and their tokens with those of the answers, in which
        equal beginnings count once.

    Raises:
        TraceError: The trace is missing or malformed, or no request is left.
    """
    block_tokens = max(1, round(_BLOCK_TOKENS * settings.token_scale))
    requests, numbers, hashes = list[Turn](), dict[int, int](), set[int]()
    turns = Counter[int]()
    for line, row, prompt_tokens, new_tokens in trace_requests(settings.trace or "", _PREFIXES):
        try:
            time_s = int(row["OffsetMs"]) / 1000
            blocks = list(map(int, row["PrefixBlocks"].split() or [""]))
        except ValueError:
            raise TraceError(
                f"Line {line} of the trace {settings.trace} must hold milliseconds and hashes of "
                f"blocks, not {row['OffsetMs']!r} and {row['PrefixBlocks']!r}; correct or remove "
                "the line."
            ) from None
        if time_s >= 60 * settings.minutes:
            break
        number = numbers.setdefault(blocks[:2][-1], len(numbers))
        tokens = max(1, round(prompt_tokens * settings.token_scale))
        if number % settings.every or tokens > settings.max_prompt_tokens:
            continue
        draws = [np.random.default_rng([seed, block]) for block in blocks]
        parts = [cut(text, int(draw.integers(len(text))), block_tokens) for draw in draws]
        prompt_ids = tuple(itertools.chain.from_iterable(parts))[:tokens]
        new = min(max(1, round(new_tokens * settings.token_scale)), settings.max_new_tokens)
        requests.append(Turn(time_s / settings.time_scale, prompt_ids, new, turns[number]))
        turns[number] += 1
        hashes.update(blocks)
    if not requests:
        raise TraceError(
            f"No request of {settings.trace} in {settings.minutes:g} minutes has at most "
            f"{settings.max_prompt_tokens} prompt tokens; raise replay.max_prompt_tokens."
        )
    return requests, len(hashes) * block_tokens + sum(turn.new_tokens for turn in requests)

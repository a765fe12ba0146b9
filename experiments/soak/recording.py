"""Shared state of a soak test: progress, outcomes, problems, and a sample of the answers."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.console import say
from experiments.study.records import append_record
from rap_env.blocks import BlockMask, block_name
from rap_env.importance.text_kinds import Shares
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import CompressionPlan, MaskOrPlan, cache_name
from rap_env.policies.loading import OrderPolicy
from rap_env.request import Request
from rap_env.runtime.engine import Engine
from rap_env.runtime.request_handle import Event, Listener, RequestHandle
from rap_env.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

_MAX_PROBLEMS = 50
_MAX_RECENT = 64
_CACHE_LEVELS = ("native", "int8", "int4", "int2")


def plain_token_ids(llm: ElasticLLM) -> list[int]:
    """The ids of a model's vocabulary that are no special tokens."""
    special = set(llm.tokenizer.all_special_ids)
    return [n for n in range(llm.adapter.vocab_size) if n not in special]


def publish(path: Path, record: dict[str, Any], summary: str) -> None:
    """Append a record to its file, and print its summary and where it is."""
    append_record(path, record)
    say(summary)
    say(f"The record is in {path}.")


class SoakState:
    """Counters and control of a soak test; thread-safe.

    Attributes:
        stop: Set when no more requests are to be sent.
        kinds: Finished requests by kind.
        outcomes: Finished requests by ``kind: outcome``.
        problems: Descriptions of the first problems.
        in_flight: Requests that are being sent or answered.
        progress_s: Time of the last progress, on the monotonic clock.
    """

    def __init__(self, requests: int) -> None:
        self.stop = threading.Event()
        self.kinds: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.problem_count = 0
        self.in_flight = 0
        self.made = 0
        self.progress_s = time.monotonic()
        self._requests = requests
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()

    def next_number(self) -> int | None:
        """Start a request and return its number; None if no request is left."""
        while True:
            self._open.wait()
            with self._lock:
                if not self._open.is_set():
                    continue  # paused just now
                if self.stop.is_set() or self.made >= self._requests:
                    return None
                self.made += 1
                self.in_flight += 1
                return self.made - 1

    def finished(self, kind: str, outcome: str) -> None:
        """Count a finished request."""
        with self._lock:
            self.in_flight -= 1
            self.kinds[kind] += 1
            self.outcomes[f"{kind}: {outcome}"] += 1
        self.progressed()

    def progressed(self) -> None:
        """Note progress."""
        self.progress_s = time.monotonic()

    def problem(self, sentence: str) -> None:
        """Record a violated expectation."""
        with self._lock:
            self.problem_count += 1
            if len(self.problems) < _MAX_PROBLEMS:
                self.problems.append(sentence)
                log.warning("%s", sentence)

    @contextmanager
    def paused(self, timeout_s: float) -> Iterator[bool]:
        """Pause the clients within a ``with`` block; yield whether all finished in time."""
        with self._lock:
            self._open.clear()
        deadline = time.monotonic() + timeout_s
        try:
            while self.in_flight and time.monotonic() < deadline:
                time.sleep(0.02)
            yield not self.in_flight
        finally:
            self._open.set()


class RandomPlans:
    """A policy that lowers or removes items in a new random order until the request fits.

    Half of its choices are masks. The others give random blocks and caches random levels first.
    """

    name = "random"

    def __init__(self, memory: MemoryModel, seed: int) -> None:
        self._memory = memory
        self._random = random.Random(seed)

    def choose(self, request: Request) -> MaskOrPlan:
        """Return a random mask or plan that fits, if one exists."""
        shape = request.batch_size, request.seq_len_tokens
        order = list(range(self._memory.facts.num_blocks))
        self._random.shuffle(order)
        fits = self._memory.dense_peak_bytes(*shape) <= request.budget_bytes
        if fits or self._random.random() < 0.5:
            return OrderPolicy(self._memory, order).choose(request)
        plan = self._lowered(order)
        for index in order:
            if self._memory.peak_bytes(plan, request) <= request.budget_bytes:
                break
            plan = plan.without(BlockMask.of(index))
        return plan

    def _lowered(self, order: Sequence[int]) -> CompressionPlan:
        facts = self._memory.facts
        levels: dict[str, str] = {}
        for index in order[: self._random.randrange(len(order) + 1)]:
            known: list[str] = [level for level in facts.weight_levels(index) if level != "removed"]
            levels[block_name(index)] = self._random.choice(known)
            if index % 2 == 0 and facts.kv_heads:
                levels[cache_name(index // 2)] = self._random.choice(_CACHE_LEVELS)
        return CompressionPlan.of(levels)


@dataclass(frozen=True)
class Answer:
    """An answer that was generated under one plan from start to end.

    Attributes:
        token_ids: Token ids of the answer, (T,).
        logprobs: Their log probabilities, (T,).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    plan: CompressionPlan
    greedy: bool

    @classmethod
    def of(cls, handle: RequestHandle) -> Answer:
        """Return the answer of a finished request."""
        return cls(
            handle.prompt_ids,
            tuple(handle.token_ids),
            tuple(handle.logprobs),
            handle.plans[0],
            handle.params.greedy,
        )


class AnswerSample:
    """A uniform sample (reservoir sampling) of at most `size` answers, each under one plan.

    Its memory is bounded, since the soak test checks that memory does not grow.

    Attributes:
        kept: The sampled answers.
        eligible: Answers generated under a single plan.
        changed: Answers during which the plan changed.
        plans: Hashes of all plans under which tokens were generated.
    """

    def __init__(self, size: int = 400, seed: int = 0) -> None:
        self.size = size
        self.kept: list[Answer] = []
        self.eligible = 0
        self.changed = 0
        self.plans: set[int] = set()
        self._running: list[RequestHandle] = []
        self._recent: OrderedDict[tuple[int, ...], RequestHandle] = OrderedDict()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def note(self, handle: RequestHandle) -> None:
        """Follow a request from its submission."""
        with self._lock:
            self._running.append(handle)
            self._recent[handle.prompt_ids] = handle
            if len(self._recent) > _MAX_RECENT:
                self._recent.popitem(last=False)  # its client disconnected
            if len(self._running) >= _MAX_RECENT:
                self._collect_ended()

    def take(self, prompt_ids: Sequence[int]) -> RequestHandle | None:
        """Remove and return the latest request with a prompt; None if it is not among the last."""
        with self._lock:
            return self._recent.pop(tuple(prompt_ids), None)

    def unfinished(self) -> list[RequestHandle]:
        """Return the requests that have not ended."""
        with self._lock:
            self._collect_ended()
            return list(self._running)

    def _collect_ended(self) -> None:
        ended = [handle for handle in self._running if handle.done]
        self._running = [handle for handle in self._running if not handle.done]
        for handle in ended:
            self._add(handle)

    def _add(self, handle: RequestHandle) -> None:
        plans = set(handle.plans)
        self.plans.update(map(hash, plans))
        self.changed += len(plans) > 1
        if len(plans) != 1:
            return
        self.eligible += 1
        if len(self.kept) < self.size:
            self.kept.append(Answer.of(handle))
        elif (index := self._random.randrange(self.eligible)) < self.size:
            self.kept[index] = Answer.of(handle)


class RecordingEngine(Engine):
    """An engine that reports progress and samples its answers for a later check.

    Attributes:
        state: Receives the progress; set before the first request.
        sample: Receives the answers; set before the first request.
    """

    state: SoakState
    sample: AnswerSample

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener | None = None,
        *,
        max_delta_nll: float | None = None,
        text_shares: Shares | None = None,
    ) -> RequestHandle:
        """Submit a request as `Engine.submit` does, and follow it."""

        def relay(event: Event) -> None:
            self.state.progressed()
            if listener is not None:
                listener(event)

        handle = super().submit(
            prompt_ids, params, relay, max_delta_nll=max_delta_nll, text_shares=text_shares
        )
        self.sample.note(handle)
        return handle

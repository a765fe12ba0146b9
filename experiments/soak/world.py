"""What all parts of a soak share: what goes on, what has come of it, and what was wrong."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.runtime.engine import Engine
from rap_env.runtime.policies import OrderPolicy
from rap_env.runtime.request_handle import Event, Listener, RequestHandle
from rap_env.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

_MOST_PROBLEMS = 50
_MOST_RECENT = 64


class World:
    """The state of a soak. Any thread may use it.

    Args:
        requests: How many requests are to be made.

    Attributes:
        stop: Set when no more requests are to be made.
        kinds: Requests made, by kind.
        outcomes: What came of them, as ``kind: outcome``.
        problems: What should not have happened, in sentences; the first of them.
        problem_count: All of them.
        in_flight: Requests that are being made.
        progress_s: When something went on last.
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
        """The number of the next request; None if there is none to be made."""
        while True:
            self._open.wait()
            with self._lock:
                if not self._open.is_set():
                    continue  # a rest began just now
                if self.stop.is_set() or self.made >= self._requests:
                    return None
                self.made += 1
                self.in_flight += 1
                return self.made - 1

    def finished(self, kind: str, outcome: str) -> None:
        """A request has come to its end."""
        with self._lock:
            self.in_flight -= 1
            self.kinds[kind] += 1
            self.outcomes[f"{kind}: {outcome}"] += 1
        self.progressed()

    def progressed(self) -> None:
        """Something went on."""
        self.progress_s = time.monotonic()

    def problem(self, sentence: str) -> None:
        """Something was wrong."""
        with self._lock:
            self.problem_count += 1
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(sentence)
                log.warning("%s", sentence)

    @property
    def all_made(self) -> bool:
        """Whether no request is left to be made."""
        return self.made >= self._requests

    @contextmanager
    def rest(self, timeout_s: float) -> Iterator[bool]:
        """Hold clients back within a ``with`` block; gives whether all came to rest in time."""
        with self._lock:
            self._open.clear()
        deadline = time.monotonic() + timeout_s
        try:
            while self.in_flight and time.monotonic() < deadline:
                time.sleep(0.02)
            yield not self.in_flight
        finally:
            self._open.set()


class RandomMasks:
    """A policy that removes blocks in another random order each time, until the request fits.

    Args:
        memory: The model's byte arithmetic.
        seed: Of the orders.
    """

    name = "random"

    def __init__(self, memory: MemoryModel, seed: int) -> None:
        self._memory = memory
        self._random = random.Random(seed)

    def choose(self, request: Request) -> BlockMask:
        """Some mask that fits, if one does."""
        order = list(range(self._memory.facts.num_blocks))
        self._random.shuffle(order)
        return OrderPolicy(self._memory, order).choose(request)


@dataclass(frozen=True)
class Answer:
    """What is kept of a request handle that was made under one mask from start to end.

    Attributes:
        prompt_ids: Tokens of the prompt.
        token_ids: Tokens of the answer, (T,).
        logprobs: Their log probabilities, (T,).
        mask: The mask.
        greedy: Whether the likeliest token was always taken.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    mask: BlockMask
    greedy: bool

    @classmethod
    def of(cls, handle: RequestHandle) -> Answer:
        """A request request's answer."""
        return cls(
            handle.prompt_ids,
            tuple(handle.token_ids),
            tuple(handle.logprobs),
            handle.masks[0],
            handle.params.greedy,
        )


class Sample:
    """Answers made under one mask from start to end, each as likely to be kept.

    It holds little, and no more as time goes on: memory is watched while it is filled.

    Args:
        size: How many are kept.
        seed: Of the choice.

    Attributes:
        kept: The answers.
        eligible: How many there were to choose from.
        changed: How many were made while the mask changed.
        masks: Hashes of the masks that tokens were made under, all of them.
    """

    def __init__(self, size: int = 400, seed: int = 0) -> None:
        self.size = size
        self.kept: list[Answer] = []
        self.eligible = 0
        self.changed = 0
        self.masks: set[int] = set()
        self._running: list[RequestHandle] = []
        self._recent: OrderedDict[tuple[int, ...], RequestHandle] = OrderedDict()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def note(self, handle: RequestHandle) -> None:
        """A request handle was made."""
        with self._lock:
            self._running.append(handle)
            self._recent[handle.prompt_ids] = handle
            if len(self._recent) > _MOST_RECENT:
                self._recent.popitem(last=False)  # of a client that went away and never asked
            if len(self._running) >= _MOST_RECENT:
                self._sort_out()

    def take(self, prompt_ids: Sequence[int]) -> RequestHandle | None:
        """The last handle for a prompt; only once, and only if it was made lately."""
        with self._lock:
            return self._recent.pop(tuple(prompt_ids), None)

    def unfinished(self) -> list[RequestHandle]:
        """Tickets that have not ended."""
        with self._lock:
            self._sort_out()
            return list(self._running)

    def _sort_out(self) -> None:
        ended = [handle for handle in self._running if handle.done]
        self._running = [handle for handle in self._running if not handle.done]
        for handle in ended:
            self._consider(handle)

    def _consider(self, handle: RequestHandle) -> None:
        masks = set(handle.masks)
        self.masks.update(map(hash, masks))
        self.changed += len(masks) > 1
        if len(masks) != 1:
            return
        self.eligible += 1
        if len(self.kept) < self.size:
            self.kept.append(Answer.of(handle))
        elif (place := self._random.randrange(self.eligible)) < self.size:
            self.kept[place] = Answer.of(handle)


class RecordingEngine(Engine):
    """An engine that keeps a fair sample of what it gave, to be computed again later.

    Attributes:
        world: Who is told that something goes on; set before the first request.
        sample: What is kept; likewise.
    """

    world: World
    sample: Sample

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, listener: Listener | None = None
    ) -> RequestHandle:
        """As `Engine.submit`."""

        def heard(event: Event) -> None:
            self.world.progressed()
            if listener is not None:
                listener(event)

        handle = super().submit(prompt_ids, params, heard)
        self.sample.note(handle)
        return handle

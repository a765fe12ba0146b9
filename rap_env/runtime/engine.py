"""Serves requests from one batch that they join and leave between steps, within a budget."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError, QueueFullError
from rap_env.runtime.metrics import EngineStats, Metrics, StepRecord
from rap_env.runtime.request_handle import Listener, RequestHandle
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.scheduler import RequestQueue, Scheduler
from rap_env.runtime.sequence import TokenSequence

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.live import Restore
    from rap_env.runtime.controller import RuntimeController

__all__ = ["Engine", "EngineStats", "StepRecord"]

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.1
"""How often a thread with nothing to do looks at the budget."""


class Engine:
    """Continuous batching over a live model whose mask follows the budget.

    Each turn (`step`) takes at most one prefilling out of the line, runs at most one chunk of its
    prompt, and decodes a token for every row of the batch; so a long prompt holds nobody up for
    longer than a chunk. Before each pass through the model the controller looks at the budget. A
    request waits while no mask fits it beside what runs. If no mask fits what runs, the newest
    request goes back to the front of the line, with its tokens, and is run again from them later.

    A row's tokens depend on its neighbours no more than by the rounding of sums, as long as the
    mask is the same.

    Args:
        llm: The live model.
        controller: Keeps it within its budget.
        max_batch_size: Most rows side by side.
        max_queue: Most requests that wait.
        max_seq_len_tokens: Longest prompt and answer together; by default the model's positions.
        prefill_chunk_tokens: Most tokens of a prompt to run in one turn.
        restore: What a restored attention block does about earlier tokens: ``"refill"`` or
            ``"next_request"`` (see `rap_env.llm.live`).
        queue_timeout_s: Longest that a request may wait; None for no limit.
        clock: Gives the time in seconds, for events and records. `step` never sleeps, so it may be
            a virtual one.

    Attributes:
        observers: Called with a `StepRecord` after each pass, from the thread that runs it.

    Raises:
        InvalidRequestError: A limit is below 1, or longer than the model's positions.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        controller: RuntimeController,
        *,
        max_batch_size: int = 8,
        max_queue: int = 64,
        max_seq_len_tokens: int | None = None,
        prefill_chunk_tokens: int = 256,
        restore: Restore = "refill",
        queue_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        facts = controller.estimator.memory.facts
        longest = facts.max_positions if max_seq_len_tokens is None else max_seq_len_tokens
        limits = (max_batch_size, max_queue, longest, prefill_chunk_tokens)
        if min(limits) < 1 or longest > facts.max_positions:
            raise InvalidRequestError(
                "Batch, queue, length and chunk must be at least 1, and the length at most "
                f"{facts.max_positions} (the positions of {facts.name}), not {limits}."
            )
        self.llm = llm
        self.controller = controller
        self.clock = clock
        self.max_batch_size = max_batch_size
        self.max_seq_len_tokens = longest
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self._vocab_size = facts.vocab_size
        self._queue = RequestQueue(max_queue)
        self._metrics = Metrics(clock)
        self._scheduler = Scheduler(
            llm,
            controller,
            self._queue,
            self._metrics,
            max_batch_size=max_batch_size,
            chunk_tokens=prefill_chunk_tokens,
            restore=restore,
            queue_timeout_s=queue_timeout_s,
            clock=clock,
        )
        self._turn_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def observers(self) -> list[Callable[[StepRecord], None]]:
        """Called with a `StepRecord` after each pass."""
        return self._scheduler.observers

    @property
    def alive(self) -> bool:
        """Whether its thread takes turns: it was started, and neither closed nor broken."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, listener: Listener | None = None
    ) -> RequestHandle:
        """Queue a request up; from any thread.

        Args:
            prompt_ids: Tokens of the prompt, at least one.
            params: How much to generate, and how.
            listener: Called with each event, see `RequestHandle.listen`.

        Raises:
            InvalidRequestError: The prompt is empty, too long with what is to come, or holds what
                is no token of the model.
            InfeasibleBudgetError: It could never fit, whatever was removed.
            QueueFullError: Too many requests wait.
            EngineClosedError: The engine was closed.
        """
        handle = RequestHandle(
            self._checked(prompt_ids, params), params, self.clock(), on_cancel=self._wake.set
        )
        sequence = TokenSequence(handle)
        if listener is not None:
            handle.listen(listener)
        try:
            self._scheduler.check_feasible(sequence)
            self._queue.append(sequence)
        except (InfeasibleBudgetError, QueueFullError):
            self._metrics.counters.refused += 1
            raise
        self._wake.set()
        return handle

    def step(self) -> bool:
        """One turn.

        Returns:
            Whether anything was done. If not, nothing runs, and nobody who waits fits now.
        """
        with self._turn_lock:
            if self._closing:
                return False
            started, spent = time.perf_counter(), self.controller.overhead_s
            worked = self._scheduler.turn()
            if worked:
                counters = self._metrics.counters
                counters.busy_s += time.perf_counter() - started
                counters.overhead_s += self.controller.overhead_s - spent
            return worked

    def warm_up(self) -> None:
        """Run a chunk of a prompt, so that the controller knows what a step takes before it counts.

        Nothing happens while requests run, or if the budget leaves no room. `start` does it.
        """
        tokens = min(self.prefill_chunk_tokens, self.max_seq_len_tokens - 1)
        with self._turn_lock:
            self._scheduler.warm_up(max(1, tokens))

    def start(self) -> None:
        """Take turns in a thread of its own, until `close`."""
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="rap-engine", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """End everything that runs or waits, and the thread. Not from a listener or an observer.

        Args:
            timeout_s: Longest to wait for the pass that is running; None for as long as it takes.
                Requests are ended in any case.
        """
        self._closing = True
        self._wake.set()
        waiting = self._queue.close()
        stopped = self._turn_lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
        try:
            prefilling = self._scheduler.prefilling
            running = [*self._scheduler.sequences, *([prefilling.sequence] if prefilling else [])]
            for sequence in (*running, *waiting, *self._queue.close()):
                self._metrics.end(sequence, "cancelled", "The engine was closed.")
            if stopped:
                self._scheduler.forget_all()
        finally:
            if stopped:
                self._turn_lock.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def stats(self) -> EngineStats:
        """A summary; from any thread, without waiting for a step."""
        counters, controller = self._metrics.counters, self.controller
        return EngineStats(
            queued=len(self._queue),
            running=len(self._scheduler.sequences) + (self._scheduler.prefilling is not None),
            served=counters.served,
            refused=counters.refused,
            cancelled=counters.cancelled,
            failed=counters.failed,
            tokens=counters.tokens,
            prompt_tokens=counters.prompt_tokens,
            preemptions=counters.preemptions,
            mask=self._scheduler.mask,
            budget_bytes=controller.budget_bytes,
            held=controller.held,
            used_bytes=controller.used_bytes,
            overhead_s=counters.overhead_s,
            busy_s=counters.busy_s,
        )

    def _checked(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        prompt = tuple(map(int, prompt_ids))
        if not prompt:
            raise InvalidRequestError("The prompt is empty; it needs at least one token.")
        total = len(prompt) + params.max_new_tokens
        if total > self.max_seq_len_tokens:
            raise InvalidRequestError(
                f"{len(prompt)} tokens of prompt and {params.max_new_tokens} new ones are more "
                f"than {self.max_seq_len_tokens}, the longest that is served."
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"Token {token} is none of the model's {self._vocab_size} (0 to "
                    f"{self._vocab_size - 1})."
                )
        return prompt

    def _run(self) -> None:
        self._try(self.warm_up)
        while not self._closing:
            self._wake.clear()
            if not self._try(self.step):
                self._wake.wait(IDLE_POLL_S)

    @staticmethod
    def _try(act: Callable[[], bool | None]) -> bool:
        try:
            return bool(act())
        except Exception:
            log.exception("A turn failed; the engine goes on.")
            return False

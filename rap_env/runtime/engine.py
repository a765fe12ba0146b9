"""Serves requests with continuous batching on a live model, within a memory budget."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    QueueFullError,
)
from rap_env.runtime.admission import RequestQueue
from rap_env.runtime.plan_chooser import no_prediction_text, predicts
from rap_env.runtime.records import EngineSettings, EngineStats
from rap_env.runtime.request_handle import Listener, RequestHandle, TokenSequence
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

_MOST_RETRY_S = 60.0
_IDLE_POLL_S = 0.1  # between reads of the budget while nothing is to be done


class Engine:
    """Continuous batching over a live model whose plan follows the budget.

    Each turn (`step`) admits at most one request from the queue, prefills at most one chunk
    of its prompt, and decodes a token for every row of the running batch; so a long prompt
    delays others by no more than a chunk at a time. Before each pass through the model the
    controller reads the budget; if it falls below what is used during a chunk, the chunk ends
    before its next layer, and is repeated later. A request waits while no plan makes it fit
    with the running batch; others overtake it only if it waits for a floor of its own, which
    no plan reaches even for it alone, or if nothing has run for a moment: then the shortest
    one that fits runs, and soon whatever margin was learned. If no plan fits the running
    batch, the newest request is preempted: it returns to the front of the queue with its
    tokens and what it has cached (`KeptSequences`), and later goes on from there. Once memory is
    back, lowered caches are read back from files, or refilled one at a time.

    As long as the plan is the same, a row's tokens depend on other rows only by rounding.

    Args:
        controller: Keeps its live model within its budget; its clock gives the times of events
            and records. `step` never sleeps, so the clock may be virtual.
        settings: Limits, and what is kept.

    Attributes:
        vocab_size: Entries of the model's vocabulary.
        observers: Called with a `StepRecord` after each pass, from the thread that runs it.

    Raises:
        InvalidRequestError: A limit is below 1, or longer than the model's positions.
    """

    def __init__(
        self, controller: RuntimeController, settings: EngineSettings = EngineSettings()
    ) -> None:
        facts = controller.estimator.memory.facts
        asked_tokens, chunk_tokens = settings.max_seq_len_tokens, settings.prefill_chunk_tokens
        longest = facts.max_positions if asked_tokens is None else asked_tokens
        limits = (settings.max_batch_size, settings.max_queue, longest, chunk_tokens)
        if min(limits) < 1 or longest > facts.max_positions:
            raise InvalidRequestError(
                "max_batch_size, max_queue, max_seq_len_tokens and prefill_chunk_tokens must be at "
                f"least 1, and max_seq_len_tokens at most {facts.max_positions} (the positions of "
                f"{facts.name}), not {limits}."
            )
        self.llm = controller.llm
        self.controller = controller
        self.clock = controller.clock
        self.max_seq_len_tokens = longest
        self.vocab_size = facts.vocab_size
        self._queue = RequestQueue(settings.max_queue)
        self._scheduler = Scheduler(controller, self._queue, settings)
        self.observers = self._scheduler.observers
        self._turn_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._turn_error: Exception | None = None  # of the last turn
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs: it was started, and neither closed nor ended."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def unready_reason(self) -> str | None:
        """Why requests should go elsewhere now, or None; from any thread, without waiting.

        Requests that are submitted nevertheless wait until they can be served, or are served
        with a lower plan while the weights of a higher one cannot be read.
        """
        if not self.alive:
            return "The engine does not run."
        if self._turn_error is not None:
            return f"The last turn of the engine failed: {self._turn_error}"
        if unreadable := self.controller.switcher.unreadable:
            return f"The plan cannot be raised: {unreadable}"
        return self._scheduler.admission.stall_reason or self.nothing_fits() or None

    def nothing_fits(self) -> str:
        """Why not even a request of one token fits now; empty if it does. From any thread."""
        return self._scheduler.admission.nothing_fits()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener | None = None,
        *,
        owner: str = "",
    ) -> RequestHandle:
        """Add a request to the queue; from any thread.

        Args:
            prompt_ids: Tokens of the prompt, at least one.
            params: How much to generate, and how to sample.
            listener: Called with each event, in the engine's thread, which waits: it should hand
                the event over and return. One that raises is not called again.
            owner: Only what was kept of requests of the same owner is used for it.

        Raises:
            InvalidRequestError: The prompt is empty or too long together with the answer; the
                prompt or the bias has an id that is not in the model's vocabulary; or the
                policy predicts nothing for the request's own floor.
            InfeasibleBudgetError: No plan could ever make it fit; a `QualityFloorError` if
                none above the floor could.
            QueueFullError: Too many requests wait.
            EngineClosedError: The engine was closed.
        """
        prompt = self._check_prompt(prompt_ids, params)
        handle = RequestHandle(
            prompt,
            params,
            self.clock(),
            listener=listener,
            on_cancel=self._wake.set,
        )
        sequence = TokenSequence(handle, owner)
        try:
            self._scheduler.check_feasible(sequence)
            self._queue.append(sequence)
        except (InfeasibleBudgetError, QueueFullError):
            self._scheduler.counters.refused += 1
            raise
        self._wake.set()
        return handle

    def step(self) -> bool:
        """Run one turn.

        Returns:
            Whether the model was run. If not, nothing runs, and no waiting request fits now.
        """
        with self._turn_lock:
            if self._closing:
                return False
            started, overhead_s = time.perf_counter(), self.controller.overhead_s
            worked = self._scheduler.turn()
            if worked:
                counters = self._scheduler.counters
                counters.busy_s += time.perf_counter() - started
                counters.overhead_s += self.controller.overhead_s - overhead_s
            return worked

    def start(self) -> None:
        """Run turns in a separate thread until `close`."""
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="rap-engine", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """Cancel all requests and end the thread. Do not call it from a listener or an observer.

        Args:
            timeout_s: Longest wait for the pass that is running; None for no limit. Requests
                are cancelled in any case.
        """
        self._closing = True
        self._wake.set()
        waiting = self._queue.close()
        stopped = self._turn_lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
        try:
            scheduler = self._scheduler
            for sequence in (*scheduler.batch.sequences, *waiting, *self._queue.close()):
                scheduler.output.end(sequence, "cancelled", "The engine was closed.")
            if stopped:
                scheduler.drop_all()
        finally:
            if stopped:
                self._turn_lock.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def retry_after_s(self) -> int:
        """Seconds after which to ask again: as long as requests have waited, 1 to 60.

        Any thread may call it.
        """
        return max(1, math.ceil(min(_MOST_RETRY_S, self._scheduler.admission.stalled_s)))

    def stats(self) -> EngineStats:
        """The counters and the present state; from any thread, without waiting for a step."""
        return EngineStats(
            **vars(self._scheduler.counters),
            queued=len(self._queue),
            running=len(self._scheduler.batch.sequences),
            plan=self._scheduler.plan,
            stalled_s=self._scheduler.admission.stalled_s,
            kept_sequences=self._scheduler.batch.kept.sequences,
            kept_bytes=self._scheduler.batch.kept.bytes,
            kept_file_bytes=self._scheduler.batch.kept.files.bytes,
        )

    def _check_prompt(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        prompt = tuple(map(int, prompt_ids))
        if not prompt:
            raise InvalidRequestError("The prompt is empty; it needs at least one token.")
        if len(prompt) + params.max_new_tokens > self.max_seq_len_tokens:
            raise InvalidRequestError(
                f"The prompt has {len(prompt)} tokens, and {params.max_new_tokens} new ones were "
                f"requested; together at most {self.max_seq_len_tokens} are served."
            )
        floor, policy = params.max_delta_nll, self.controller.chooser.policy
        if floor is not None and not predicts(policy):
            raise InvalidRequestError(no_prediction_text(floor, policy.name))
        biased = [token for token, _ in params.logit_bias]
        for token in (min(prompt), max(prompt), *biased):
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"Token {token} is not in the model's vocabulary (0 to {self.vocab_size - 1})."
                )
        return prompt

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            worked = False
            try:
                worked, self._turn_error = self.step(), None
            except Exception as error:
                if repr(error) != repr(self._turn_error):  # else it is logged already
                    log.exception("A turn of the engine failed; the engine continues.")
                self._turn_error = error
            if not worked:
                self.controller.monitor.meter.rest()
                self._wake.wait(_IDLE_POLL_S)

"""A request on its way through the engine, as seen by the one who made it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rap_env.blocks import BlockMask
from rap_env.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

Reason = Literal["stop", "length", "cancelled", "error"]
"""A stop token came, all tokens are there, somebody cancelled it, or it failed."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class TokenEvent:
    """A token was generated.

    Attributes:
        token_id: The token.
        logprob: Its log-probability in nats under the model as masked.
        time_s: On the engine's clock.
    """

    token_id: int
    logprob: float
    time_s: float


@dataclass(frozen=True)
class EndEvent:
    """There will be no more tokens.

    Attributes:
        reason: Why.
        error: What went wrong, in a sentence for the user; None if nothing did.
        time_s: On the engine's clock.
        refused: Whether it failed for want of room or patience, and may succeed later.
    """

    reason: Reason
    error: str | None
    time_s: float
    refused: bool = False


Event = TokenEvent | EndEvent
Listener = Callable[[Event], None]


class RequestHandle:
    """A request and what has become of it. The engine writes it; anybody may read and cancel it.

    Args:
        prompt_ids: Tokens of the prompt.
        params: How to generate.
        arrived_s: When it arrived, on the engine's clock.
        on_cancel: Called when somebody cancels it, from any thread.

    Attributes:
        id: A number that no other handle of this process has.
        prompt_ids: As given.
        params: As given.
        arrived_s: As given.
        first_token_s: When its first token was there, or None so far.
        ended_s: When it ended, or None so far.
        token_ids: The tokens generated so far.
        logprobs: Their log-probabilities in nats.
        masks: The mask under which each of them was computed.
        reason: Why it ended, or None so far.
        error: What went wrong, if anything did.
        preemptions: How often it had to make room for others and start over from its tokens.
        cancelled: Whether somebody asked for an early end.
    """

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        arrived_s: float,
        *,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.id = next(_numbers)
        self.prompt_ids = prompt_ids
        self.params = params
        self.arrived_s = arrived_s
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.masks: list[BlockMask] = []
        self.reason: Reason | None = None
        self.error: str | None = None
        self.preemptions = 0
        self.cancelled = False
        self._events: list[Event] = []
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._on_cancel = on_cancel

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ask for an early end, from any thread; it comes between two steps."""
        self.cancelled = True
        wake = self._on_cancel
        if wake is not None:
            wake()

    def result(self, timeout_s: float | None = None) -> RequestHandle:
        """Wait for the end.

        Args:
            timeout_s: Longest to wait, in seconds; None for as long as it takes.

        Returns:
            This handle.

        Raises:
            TimeoutError: It has not ended by then; it goes on.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"Request {self.id} has not ended within {timeout_s} s.")
        return self

    def listen(self, callback: Listener) -> None:
        """Have every event passed on, those of the past at once and later ones as they come.

        Calls come from the engine's thread, which waits meanwhile: hand the event over and return.
        A callback that raises is not called again, and nobody else notices.
        """
        with self._lock:
            self._listeners.append(callback)
            for event in self._events:
                self._tell(callback, event)

    def emit(self, event: Event) -> None:
        """Take in what happened and pass it on; for the engine. Nothing follows an end."""
        with self._lock:
            if self.done:
                return
            self._events.append(event)
            if isinstance(event, TokenEvent):
                self.token_ids.append(event.token_id)
                self.logprobs.append(event.logprob)
                if self.first_token_s is None:
                    self.first_token_s = event.time_s
            else:
                self.ended_s, self.reason, self.error = event.time_s, event.reason, event.error
            for callback in tuple(self._listeners):
                self._tell(callback, event)
            if isinstance(event, EndEvent):
                self._ended.set()
                self._listeners.clear()
                self._on_cancel = None

    def _tell(self, callback: Listener, event: Event) -> None:
        if callback not in self._listeners:
            return
        try:
            callback(event)
        except Exception:
            log.exception("A listener of request %d failed and is not called again.", self.id)
            self._listeners.remove(callback)

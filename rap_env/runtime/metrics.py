"""What an engine tells of itself: a record of each step, and a summary at any time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rap_env.blocks import BlockMask
from rap_env.errors import RapError
from rap_env.llm.sites import HeldBytes
from rap_env.runtime.request_handle import EndEvent, Reason, TokenEvent
from rap_env.runtime.sampling import Drawn, draw_rows
from rap_env.runtime.sequence import TokenSequence

StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class StepRecord:
    """One pass through the model.

    Attributes:
        time_s: When it began, on the engine's clock.
        duration_s: Seconds that it took, by the wall.
        kind: A chunk of a prompt, or a token for each row.
        rows: Sequences that it served.
        length: Tokens held for each of them afterwards, padding included.
        mask: The mask that it ran with.
        held: Bytes of all tensors held afterwards.
        peak_bytes: Most bytes measured since the last step or switch.
        budget_bytes: The budget, as asked before the step.
    """

    time_s: float
    duration_s: float
    kind: StepKind
    rows: int
    length: int
    mask: BlockMask
    held: HeldBytes
    peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment. Requests and tokens are counted since it was made.

    Attributes:
        queued: Requests that wait, for the first time or again.
        running: Requests that are in the batch or on the way into it.
        served: Requests that ended by a stop token or their length.
        refused: Requests turned away: the queue was full, no mask could ever fit, or they had
            waited too long.
        cancelled: Requests ended by those who made them, or by the engine's end.
        failed: Requests ended by an error.
        tokens: Tokens generated.
        prompt_tokens: Tokens of prompts that were run, those run again included.
        preemptions: How often a request had to leave the batch and start over.
        mask: The mask of the last step.
        budget_bytes: The budget when last asked.
        held: Bytes of all tensors held after the last step.
        used_bytes: Bytes measured when last asked.
        overhead_s: Seconds of turns that did something which the controller took.
        busy_s: Seconds of those turns.
    """

    queued: int
    running: int
    served: int
    refused: int
    cancelled: int
    failed: int
    tokens: int
    prompt_tokens: int
    preemptions: int
    mask: BlockMask
    budget_bytes: int
    held: HeldBytes
    used_bytes: int
    overhead_s: float
    busy_s: float


@dataclass
class Counters:
    """What an engine counts; see `EngineStats`."""

    served: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    overhead_s: float = 0.0
    busy_s: float = 0.0


log = logging.getLogger(__name__)


class Metrics:
    """What sequences get, and the count of it.

    Args:
        clock: Gives the time of events, in seconds.

    Attributes:
        counters: The count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.counters = Counters()

    def deliver(
        self, sequences: Sequence[TokenSequence], logits: torch.Tensor, mask: BlockMask
    ) -> list[bool]:
        """Draw a token for each sequence and hand it out.

        Args:
            sequences: B sequences.
            logits: (B, V), float32.
            mask: What they were computed with.

        Returns:
            For each sequence whether it goes on.
        """
        drawn = draw_rows([sequence.sampler for sequence in sequences], logits)
        now = self._clock()
        return [
            self._hand(sequence, new, mask, now)
            for sequence, new in zip(sequences, drawn, strict=True)
        ]

    def end(self, sequence: TokenSequence, reason: Reason, error: str | None = None) -> None:
        """End a sequence, unless it has ended."""
        if sequence.handle.done:
            return
        if reason == "cancelled":
            self.counters.cancelled += 1
        elif reason == "error":
            self.counters.failed += 1
        else:
            self.counters.served += 1
        sequence.handle.emit(EndEvent(reason, error, self._clock()))

    def refuse(self, sequence: TokenSequence, error: str) -> None:
        """End a sequence that was never begun, or that cannot be gone on with."""
        self.counters.refused += 1
        sequence.handle.emit(EndEvent("error", error, self._clock(), refused=True))

    def fail(self, sequences: Sequence[TokenSequence], error: Exception) -> None:
        """End sequences whose step raised an error."""
        if isinstance(error, RapError):
            log.warning("A step failed: %s", error)
        else:
            log.error("A step failed.", exc_info=error)
        for sequence in sequences:
            self.end(sequence, "error", f"The step failed: {error}")

    def _hand(
        self, sequence: TokenSequence, new: Drawn | None, mask: BlockMask, now: float
    ) -> bool:
        handle, params = sequence.handle, sequence.handle.params
        if new is None:
            self.end(sequence, "error", "The model gave no finite logits.")
            return False
        if new.token_id in params.stop_token_ids:
            self.end(sequence, "stop")
            return False
        handle.masks.append(mask)
        handle.emit(TokenEvent(new.token_id, new.logprob, now))
        self.counters.tokens += 1
        if len(handle.token_ids) < params.max_new_tokens:
            return True
        self.end(sequence, "length")
        return False

"""What an engine tells of itself: a record of each step, and a summary at any time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rap_env.blocks import BlockMask
from rap_env.llm.sites import HeldBytes

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
class Tally:
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

"""The settings of a controller and an engine, and what is recorded: steps and counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.plan import Plan

if TYPE_CHECKING:
    from rap_env.models.live.elastic import HeldBytes

StepKind = Literal["prefill", "decode"]

Trigger = Literal["arrival", "budget_fell", "room"]
"""What caused a switch: a request arrived, the budget fell below the need, or there was
headroom again."""


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """How plans are chosen, and when they are raised.

    Attributes:
        guard_order: Indices of blocks in the order in which the guard removes them. By
            default the policy's `order` if it has one, else those that free most bytes first.
            An empty order disables the guard: only the policy's own plan is tried.
        max_delta_nll: Quality floor: largest rise in NLL, in nats per token, that the policy
            may predict for a plan with which a batch runs. Other plans, and those without a
            prediction, count as plans that do not fit. None for no floor.
        most_delta_nll: What the floor rises to with waiting requests
            (`PlanChooser.follow_queue`); None for a floor that stays.
        chunk_tokens: Most tokens that one pass through the model runs; fewer need less
            workspace.
        hold_s: Seconds for which headroom must last while requests run, so that the plan does
            not flap.
        spare_share: Share of the budget that a raised plan leaves free.
    """

    guard_order: Sequence[int] | None = None
    max_delta_nll: float | None = None
    most_delta_nll: float | None = None
    chunk_tokens: int = PREFILL_CHUNK_TOKENS
    hold_s: float = 2.0
    spare_share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of an `Engine`.

    Attributes:
        max_batch_size: Most rows of the running batch.
        max_queue: Most requests that wait.
        max_seq_len_tokens: Longest prompt and answer together; by default the model's
            positions.
        prefill_chunk_tokens: Most tokens of a prefill chunk.
        queue_timeout_s: Longest that a request may wait; None for no limit.
        target_itl_s: Mean seconds between the tokens of an answer while prompts of others are
            read: as many decode steps follow each chunk as that takes; None for one.
        keep: Whether prompts and answers that were read stay in memory that is free, so that
            requests that begin as they do need not read them again (`KeptSequences`).
        keep_delta_nll: Rise in NLL, nats per token, by which what is kept may be worse than
            the plan.
        keep_file_bytes: Bytes of files to which what is kept goes when it has no room in
            memory, and from which it is read where that is faster than reading the prompt.
    """

    max_batch_size: int = 8
    max_queue: int = 64
    max_seq_len_tokens: int | None = None
    prefill_chunk_tokens: int = 256
    queue_timeout_s: float | None = None
    target_itl_s: float | None = None
    keep: bool = True
    keep_delta_nll: float = 0.005
    keep_file_bytes: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One pass through the model.

    Attributes:
        time_s: Start time on the engine's clock.
        kind: A prefill chunk of one prompt, or a decode step of the running batch.
        rows: Sequences in the pass.
        length: Cached tokens of each of them afterwards, padding included.
        plan: The plan that the pass ran with.
        held: Bytes of all tensors held afterwards.
        peak_bytes: Peak bytes measured since the last step or switch.
        budget_bytes: The budget as last read before the step.
    """

    time_s: float
    kind: StepKind
    rows: int
    length: int
    plan: Plan
    held: HeldBytes
    peak_bytes: int
    budget_bytes: int


@dataclass
class Counters:
    """Totals since the engine was made.

    Attributes:
        served: Requests that ended by a stop token or their token limit.
        refused: Requests that were rejected: the queue was full, no plan could ever fit, or
            they had waited too long.
        cancelled: Requests cancelled by the caller, or because the engine was closed.
        failed: Requests ended by an error.
        tokens: Tokens generated.
        prompt_tokens: Prefilled tokens, those prefilled again after a preemption included.
        repeated_tokens: Those of them that had been in a cache before the preemption.
        kept_tokens: Tokens that were not prefilled, because they were kept.
        refilled_tokens: Tokens computed again at better levels of caches.
        preemptions: How often a request was preempted and restarted.
        overhead_s: Seconds that the controller took in turns that ran the model.
        busy_s: Seconds of those turns.
    """

    served: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    repeated_tokens: int = 0
    kept_tokens: int = 0
    refilled_tokens: int = 0
    preemptions: int = 0
    overhead_s: float = 0.0
    busy_s: float = 0.0


@dataclass(kw_only=True)
class EngineStats(Counters):
    """An engine's counters and its state at one moment.

    Attributes:
        queued: Requests in the queue, preempted ones included.
        running: Requests in the running batch or in prefill.
        plan: The plan of the last step.
        stalled_s: Seconds for which requests have waited while nothing ran.
        kept_sequences: Sequences that are kept beside those that run.
        kept_bytes: Their bytes in memory.
        kept_file_bytes: Bytes of the files in which others of them are.
    """

    queued: int
    running: int
    plan: Plan
    stalled_s: float
    kept_sequences: int = 0
    kept_bytes: int = 0
    kept_file_bytes: int = 0

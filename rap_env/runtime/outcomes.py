"""Hands tokens and ends out to tickets, and counts them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from rap_env.blocks import BlockMask
from rap_env.errors import RapError
from rap_env.runtime.jobs import Job
from rap_env.runtime.records import Tally
from rap_env.runtime.sampling import Drawn, draw_rows
from rap_env.runtime.tickets import EndEvent, Reason, TokenEvent

log = logging.getLogger(__name__)


class Outcomes:
    """What jobs get, and the count of it.

    Args:
        clock: Gives the time of events, in seconds.

    Attributes:
        tally: The count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.tally = Tally()

    def deliver(self, jobs: Sequence[Job], logits: torch.Tensor, mask: BlockMask) -> list[bool]:
        """Draw a token for each job and hand it out.

        Args:
            jobs: B jobs.
            logits: (B, V), float32.
            mask: What they were computed with.

        Returns:
            For each job whether it goes on.
        """
        drawn = draw_rows([job.sampler for job in jobs], logits)
        now = self._clock()
        return [self._hand(job, new, mask, now) for job, new in zip(jobs, drawn, strict=True)]

    def end(self, job: Job, reason: Reason, error: str | None = None) -> None:
        """End a job, unless it has ended."""
        if job.ticket.done:
            return
        if reason == "cancelled":
            self.tally.cancelled += 1
        elif reason == "error":
            self.tally.failed += 1
        else:
            self.tally.served += 1
        job.ticket.emit(EndEvent(reason, error, self._clock()))

    def refuse(self, job: Job, error: str) -> None:
        """End a job that was never begun, or that cannot be gone on with."""
        self.tally.refused += 1
        job.ticket.emit(EndEvent("error", error, self._clock(), refused=True))

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """End jobs whose step raised an error."""
        if isinstance(error, RapError):
            log.warning("A step failed: %s", error)
        else:
            log.error("A step failed.", exc_info=error)
        for job in jobs:
            self.end(job, "error", f"The step failed: {error}")

    def _hand(self, job: Job, new: Drawn | None, mask: BlockMask, now: float) -> bool:
        ticket, params = job.ticket, job.ticket.params
        if new is None:
            self.end(job, "error", "The model gave no finite logits.")
            return False
        if new.token_id in params.stop_token_ids:
            self.end(job, "stop")
            return False
        ticket.masks.append(mask)
        ticket.emit(TokenEvent(new.token_id, new.logprob, now))
        self.tally.tokens += 1
        if len(ticket.token_ids) < params.max_new_tokens:
            return True
        self.end(job, "length")
        return False

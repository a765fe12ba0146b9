"""What became of requests, and of all of them under one system."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.replay.load import Asked
from experiments.replay.monitor import WatchedController
from experiments.replay.systems import System
from experiments.replay.time_series import Trail
from rap_env.runtime.engine import EngineStats
from rap_env.runtime.tickets import Ticket

_WAITED_TOO_LONG, _NEVER_FITS = "waited longer", "fit no budget"
"""What the engine says of requests that it gives up."""


@dataclass
class Handled:
    """What became of one request.

    Attributes:
        asked: The request.
        ticket: What the engine made of it; None if it was refused.
        outcome: One of `experiments.replay.rows.OUTCOMES`.
        waited: Whether it waited because there was no room.
    """

    asked: Asked
    ticket: Ticket | None = None
    outcome: str = "unserved"
    waited: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token; None without one."""
        if self.ticket is None or self.ticket.first_token_s is None:
            return None
        return self.ticket.first_token_s - self.asked.time_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds of each token after the first; None where there was but one."""
        ticket = self.ticket
        if ticket is None or ticket.first_token_s is None or ticket.ended_s is None:
            return None
        more = len(ticket.token_ids) - 1
        return (ticket.ended_s - ticket.first_token_s) / more if more > 0 else None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        refused = self.outcome in ("refused", "queue_full")
        return refused or bool(self.ticket and self.ticket.done)

    def note_end(self) -> None:
        """Take the outcome over from a ticket that is done."""
        ticket = self.ticket
        if ticket is None or not ticket.done:
            return
        error = ticket.error or ""
        if ticket.reason in ("length", "stop"):
            self.outcome = "served"
        elif _WAITED_TOO_LONG in error:
            self.outcome = "timed_out"
        elif _NEVER_FITS in error:
            self.outcome = "refused"
        elif ticket.reason == "error":
            self.outcome = "failed"


@dataclass(frozen=True)
class Served:
    """What a system did.

    Attributes:
        system: The system.
        handled: What became of each request, in order of arrival.
        trail: What happened over time.
        controller: Its counters.
        stats: Those of the engine.
        busy_s: Seconds of the turns of the engine that did something.
        energy_j: Joules of the machine meanwhile, or None.
    """

    system: System
    handled: tuple[Handled, ...]
    trail: Trail
    controller: WatchedController
    stats: EngineStats
    busy_s: float
    energy_j: float | None

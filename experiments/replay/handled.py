"""What became of requests, and of all of them under one system."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.replay.load import Asked
from experiments.replay.monitor import WatchedController
from experiments.replay.systems import System
from experiments.replay.time_series import Trail
from rap_env.runtime.engine import EngineStats
from rap_env.runtime.request_handle import RequestHandle

_WAITED_TOO_LONG, _NEVER_FITS = "waited longer", "fit no budget"
"""What the engine says of requests that it gives up."""


@dataclass
class Handled:
    """What became of one request.

    Attributes:
        asked: The request.
        handle: What the engine made of it; None if it was refused.
        outcome: One of `experiments.replay.rows.OUTCOMES`.
        waited: Whether it waited because there was no room.
    """

    asked: Asked
    handle: RequestHandle | None = None
    outcome: str = "unserved"
    waited: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token; None without one."""
        if self.handle is None or self.handle.first_token_s is None:
            return None
        return self.handle.first_token_s - self.asked.time_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds of each token after the first; None where there was but one."""
        handle = self.handle
        if handle is None or handle.first_token_s is None or handle.ended_s is None:
            return None
        more = len(handle.token_ids) - 1
        return (handle.ended_s - handle.first_token_s) / more if more > 0 else None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        refused = self.outcome in ("refused", "queue_full")
        return refused or bool(self.handle and self.handle.done)

    def note_end(self) -> None:
        """Take the outcome over from a request handle that is done."""
        handle = self.handle
        if handle is None or not handle.done:
            return
        error = handle.error or ""
        if handle.reason in ("length", "stop"):
            self.outcome = "served"
        elif _WAITED_TOO_LONG in error:
            self.outcome = "timed_out"
        elif _NEVER_FITS in error:
            self.outcome = "refused"
        elif handle.reason == "error":
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

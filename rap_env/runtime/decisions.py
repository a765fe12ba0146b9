"""Decisions of the controller as JSON lines: when, why, from which mask to which, at what cost."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rap_env.blocks import BlockMask
from rap_env.runtime.batch_shape import BatchShape

log = logging.getLogger(__name__)

Why = Literal["arrival", "budget_fell", "room", "left"]
"""A request arrived, the budget fell below what is needed, there was room again, or a request had
left and made room."""


@dataclass(frozen=True)
class Decision:
    """One switch from a mask to another.

    Attributes:
        time_s: On the controller's clock.
        wall_time: ISO 8601, UTC.
        why: What gave rise to it.
        before: The mask that was applied.
        after: The mask that is.
        bytes_before: Measured before the switch.
        bytes_after: Measured after it.
        budget_bytes: The budget that it had to fit.
        shape: What it had to fit for.
        decision_s: Seconds that it took to choose the mask.
        switch_s: Seconds that it took to apply it.
        guarded: Whether the policy's mask did not do, and the guard chose.
    """

    time_s: float
    wall_time: str
    why: Why
    before: BlockMask
    after: BlockMask
    bytes_before: int
    bytes_after: int
    budget_bytes: int
    shape: BatchShape
    decision_s: float
    switch_s: float
    guarded: bool

    def to_record(self) -> dict[str, Any]:
        """As it is logged."""
        return {
            "time_s": self.time_s,
            "wall_time": self.wall_time,
            "why": self.why,
            "from": list(self.before.names),
            "to": list(self.after.names),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "budget_bytes": self.budget_bytes,
            "demand": asdict(self.shape),
            "decision_s": self.decision_s,
            "switch_s": self.switch_s,
            "guarded": self.guarded,
        }


class DecisionLog:
    """A file of decisions, one JSON object a line, whole after any kill.

    A line is written in one piece. What a killed process left of its last line is cut off when the
    file is opened again. A disk that fails later costs lines, not the service: they are
    counted in `lost`.

    Args:
        path: The file; it is made, with its folder, if there is none.

    Attributes:
        path: The file.
        lost: Lines that could not be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lost = 0
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        repair(self.path)

    def append(self, decision: Decision) -> None:
        """Write a decision."""
        line = json.dumps(decision.to_record(), allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._file.closed:
                return
            try:
                written = self._file.write(line)
                if written is not None and written < len(line):  # the disk is full
                    repair(self.path)
                    raise OSError(f"{written} of {len(line)} bytes were written")
            except OSError as error:
                if not self.lost:
                    log.warning("Decisions are not logged any more in %s: %s", self.path, error)
                self.lost += 1

    def close(self) -> None:
        """Close the file; later decisions are dropped."""
        with self._lock:
            self._file.close()


def repair(path: Path) -> None:
    """Cut off what follows the last whole line of a file, if anything does."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        tail = b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(end - start)
        whole = start + tail.rfind(b"\n") + 1
        if whole < end:
            log.warning("%s ended in a torn line, which was cut off.", path)
            file.truncate(whole)

"""The controller's decisions as JSON lines: when, why, which plan replaced which, at what cost."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rap_env.artifacts import remove_incomplete_line
from rap_env.plan import Plan
from rap_env.runtime.batch_shape import BatchShape

log = logging.getLogger(__name__)

Trigger = Literal["arrival", "budget_fell", "room", "left"]
"""What caused a switch: a request arrived, the budget fell below the need, there was headroom
again, or a request left and freed memory."""


@dataclass(frozen=True)
class Decision:
    """A switch from one plan to another.

    Attributes:
        time_s: On the controller's clock.
        wall_time: ISO 8601, UTC.
        trigger: What caused it; ``why`` in the log.
        before: The plan before the switch; ``from`` in the log.
        after: That after it; ``to`` in the log. A mask is logged as the list of its blocks, any
            other plan as an object of items and levels.
        bytes_before: Measured before the switch.
        bytes_after: Measured after it.
        budget_bytes: The budget.
        shape: The batch that the plan had to fit; ``demand`` in the log.
        decision_s: Seconds spent choosing the plan.
        switch_s: Seconds spent applying it.
        guarded: Whether the guard changed the policy's plan.
    """

    time_s: float
    wall_time: str
    trigger: Trigger
    before: Plan
    after: Plan
    bytes_before: int
    bytes_after: int
    budget_bytes: int
    shape: BatchShape
    decision_s: float
    switch_s: float
    guarded: bool

    def to_record(self) -> dict[str, Any]:
        """The decision as it is logged."""
        shape = self.shape
        names = {"trigger": "why", "before": "from", "after": "to", "shape": "demand"}
        values = vars(self) | {
            "before": _plan_record(self.before),
            "after": _plan_record(self.after),
            "shape": {"batch_size": shape.batch_size, "seq_len_tokens": shape.seq_len_tokens},
        }
        return {names.get(name, name): value for name, value in values.items()}


def _plan_record(plan: Plan) -> list[str] | dict[str, str]:
    return list(plan.removed_names) if plan.is_mask else plan.levels


class DecisionLog:
    """A file of decisions, one JSON object a line; it and its folder are created if missing.

    Each line is written by one call. An incomplete last line, left by a killed process, is removed
    when the file is opened again. If the disk fails later, lines are lost and counted in `lost`,
    and the service continues.

    Attributes:
        lost: Number of lines that could not be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lost = 0
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        remove_incomplete_line(self.path)

    def append(self, decision: Decision) -> None:
        """Append a decision to the file."""
        line = json.dumps(decision.to_record(), allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._file.closed:
                return
            try:
                written = self._file.write(line)
                if written is not None and written < len(line):  # the disk is full
                    remove_incomplete_line(self.path)
                    raise OSError(f"only {written} of {len(line)} bytes were written")
            except OSError as error:
                if not self.lost:
                    log.warning("Decisions can no longer be logged in %s: %s", self.path, error)
                self.lost += 1

    def close(self) -> None:
        """Close the file; later decisions are not logged."""
        with self._lock:
            self._file.close()

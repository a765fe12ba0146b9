"""What is recorded of an engine: its steps, its counters, and the changes of its plan."""

from __future__ import annotations

import json
import logging
import os
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rap_env.artifacts import remove_incomplete_line
from rap_env.models.live.live_blocks import HeldBytes
from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape

StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class StepRecord:
    """One pass through the model.

    Attributes:
        time_s: Start time on the engine's clock.
        duration_s: Wall-clock seconds.
        kind: A prefill chunk of one prompt, or a decode step of the running batch.
        rows: Sequences in the pass.
        length: Cached tokens of each of them afterwards, padding included.
        plan: The plan that the pass ran with.
        held: Bytes of all tensors held afterwards.
        peak_bytes: Peak bytes measured since the last step or switch.
        budget_bytes: The budget as last read before the step.
    """

    time_s: float
    duration_s: float
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
        interruptions: Prefill chunks that ended between two layers because the budget had
            fallen.
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
    interruptions: int = 0
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
        lowered_rows: Decoding requests whose caches have lower levels than the plan.
        kept_sequences: Sequences that are kept beside those that run.
        kept_bytes: Their bytes in memory.
        kept_file_bytes: Bytes of the files in which others of them are.
    """

    queued: int
    running: int
    plan: Plan
    stalled_s: float
    lowered_rows: int
    kept_sequences: int = 0
    kept_bytes: int = 0
    kept_file_bytes: int = 0


log = logging.getLogger(__name__)

_MOST_BYTES = 400  # of a decision's line

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
        before: The plan before the switch; its digest is ``from`` in the log.
        after: That after it; its digest is ``to`` in the log, and ``changed`` there is what
            changed in words, as far as the line has room for them.
        bytes_before: Measured before the switch.
        bytes_after: Measured after it.
        budget_bytes: The budget.
        shape: The batch that the plan had to fit; ``demand`` in the log, as sequences x
            tokens.
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

    def to_json(self) -> str:
        """The decision as it is logged, in at most `_MOST_BYTES`."""
        record: dict[str, Any] = {
            "time_s": round(self.time_s, 3),
            "wall_time": self.wall_time,
            "why": self.trigger,
            "changed": "",
            "from": self.before.digest,
            "to": self.after.digest,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "budget_bytes": self.budget_bytes,
            "demand": f"{self.shape.batch_size}x{self.shape.seq_len_tokens}",
            "decision_s": round(self.decision_s, 5),
            "switch_s": round(self.switch_s, 5),
            "guarded": self.guarded,
        }
        room = _MOST_BYTES - len(json.dumps(record))
        record["changed"] = textwrap.shorten(self.before.summary_of_change(self.after), room)
        return json.dumps(record, allow_nan=False)


class DecisionLog:
    """A file of decisions, one JSON object a line; it and its folder are created if missing.

    Each line is written by one call. An incomplete last line, left by a killed process, is
    removed when the file is opened again. If the disk fails later, lines are lost and counted
    in `lost`, and the service continues.

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
        line = decision.to_json().encode() + b"\n"
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

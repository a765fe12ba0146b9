"""Time series of a replay: steps and idle intervals, memory against the budget, plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from experiments.replay.budgets import Budget
from rap_env.blocks import BlockMask
from rap_env.plan import CompressionPlan
from rap_env.runtime.decisions import plan_record

Value = TypeVar("Value", CompressionPlan, str)

IDLE = "idle"
"""Kind of an interval in which no request runs."""

MAX_RECORDS = 600
"""Approximate number of records that are written; a record then summarises several steps."""


@dataclass(frozen=True)
class Interval:
    """One engine step, or a time without a running request.

    Attributes:
        kind: Kind of the engine step, or `IDLE`.
        rows: Running sequences.
        length: Tokens of each of them, padding included.
        peak_bytes: Maximum of the measured bytes.
        budget_bytes: The budget at the start.
    """

    time_s: float
    duration_s: float
    kind: str
    rows: int
    length: int
    plan: CompressionPlan
    peak_bytes: int
    budget_bytes: int

    @property
    def end_s(self) -> float:
        """End of the interval."""
        return self.time_s + self.duration_s

    @property
    def over_bytes(self) -> int:
        """Measured bytes above the budget."""
        return max(0, self.peak_bytes - self.budget_bytes)

    def late_byte_s(self, budget: Budget) -> float:
        """Byte-seconds above a budget that fell during the interval."""
        within = min(self.peak_bytes, self.budget_bytes)
        pieces = budget.pieces(self.time_s, self.end_s)
        return sum(max(0, within - level) * seconds for seconds, level in pieces)


@dataclass(frozen=True)
class TimeSeries:
    """All intervals of a system, in order of time."""

    intervals: tuple[Interval, ...]

    @property
    def violation_byte_s(self) -> float:
        """Integral of measured bytes above the budget, in byte-seconds."""
        return sum(interval.over_bytes * interval.duration_s for interval in self.intervals)

    @property
    def violations(self) -> int:
        """Intervals with measured bytes above the budget."""
        return sum(interval.over_bytes > 0 for interval in self.intervals)

    @property
    def peak_bytes(self) -> int:
        """Maximum of the measured bytes."""
        return max((interval.peak_bytes for interval in self.intervals), default=0)

    def late_byte_s(self, budget: Budget) -> float:
        """Byte-seconds above a budget that fell while a step ran, up to its end."""
        return sum(m.late_byte_s(budget) for m in self.intervals if m.kind != IDLE)

    def downsampled(self, count: int = MAX_RECORDS) -> list[dict[str, Any]]:
        """Return about `count` records, each of consecutive intervals.

        A record has bytes and budget of the interval with the largest excess over the budget, the
        maximum of sequences and tokens, and the plan and kind that lasted longest.
        """
        if not self.intervals:
            return []
        start, end = self.intervals[0].time_s, self.intervals[-1].end_s
        width = max(end - start, 1e-9) / count
        groups: dict[int, list[Interval]] = {}
        for interval in self.intervals:
            groups.setdefault(int((interval.time_s - start) / width), []).append(interval)
        return [_record(group) for group in groups.values()]


def _record(group: Sequence[Interval]) -> dict[str, Any]:
    worst = max(group, key=lambda m: m.peak_bytes - m.budget_bytes)
    return {
        "time_s": round(group[0].time_s, 4),
        "until_s": round(group[-1].end_s, 4),
        "kind": _longest((m.kind, m.duration_s) for m in group),
        "rows": max(m.rows for m in group),
        "length": max(m.length for m in group),
        "peak_bytes": worst.peak_bytes,
        "budget_bytes": worst.budget_bytes,
        "mask": plan_record(_longest((m.plan, m.duration_s) for m in group)),
    }


def _longest(entries: Iterable[tuple[Value, float]]) -> Value:
    """Return the value with the longest total duration."""
    held: dict[Value, float] = {}
    for value, seconds in entries:
        held[value] = held.get(value, 0.0) + seconds
    return max(held, key=held.__getitem__)


def recorded_mask(value: Sequence[str] | Mapping[str, str] | str) -> BlockMask:
    """Read the removed blocks of a record: names of a mask's blocks, or the levels of a plan.

    Older records hold a hexadecimal number whose bit i is set if block i is removed.
    """
    if isinstance(value, str):
        bits = int(value, 16)
        return BlockMask(frozenset(i for i in range(bits.bit_length()) if bits >> i & 1))
    return CompressionPlan.of(value).removed if isinstance(value, Mapping) else BlockMask.of(*value)

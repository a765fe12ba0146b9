"""What a system did over time: steps and idle times, bytes against the budget, masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.replay.budgets import Budget
from rap_env.blocks import BlockMask

IDLE = "idle"
"""The kind of a moment in which nothing runs."""

KEPT_ROWS = 600
"""About so many rows of a trail are written; a row then stands for several steps."""


@dataclass(frozen=True)
class Moment:
    """One step, or a time in which nothing ran.

    Attributes:
        time_s: When it began.
        duration_s: How long it took.
        kind: As the engine calls it, or `IDLE`.
        rows: Sequences that ran.
        length: Tokens of each of them, padding included.
        mask: The mask under which they ran.
        peak_bytes: Most bytes that were measured in it.
        budget_bytes: The budget when it began.
    """

    time_s: float
    duration_s: float
    kind: str
    rows: int
    length: int
    mask: BlockMask
    peak_bytes: int
    budget_bytes: int

    @property
    def end_s(self) -> float:
        """When it ended."""
        return self.time_s + self.duration_s

    @property
    def over_bytes(self) -> int:
        """Measured bytes above the budget."""
        return max(0, self.peak_bytes - self.budget_bytes)

    def late_byte_s(self, budget: Budget) -> float:
        """Byte-seconds above what the budget fell to while it went on."""
        within = min(self.peak_bytes, self.budget_bytes)
        pieces = budget.pieces(self.time_s, self.end_s)
        return sum(max(0, within - level) * seconds for seconds, level in pieces)


@dataclass(frozen=True)
class Trail:
    """All moments of a system, in order of time."""

    moments: tuple[Moment, ...]

    @property
    def violation_byte_s(self) -> float:
        """Integral of measured bytes above the budget, in byte-seconds."""
        return sum(moment.over_bytes * moment.duration_s for moment in self.moments)

    @property
    def violations(self) -> int:
        """Moments with measured bytes above the budget."""
        return sum(moment.over_bytes > 0 for moment in self.moments)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were measured."""
        return max((moment.peak_bytes for moment in self.moments), default=0)

    def late_byte_s(self, budget: Budget) -> float:
        """Byte-seconds above a budget that fell while a step ran, up to its end."""
        return sum(m.late_byte_s(budget) for m in self.moments if m.kind != IDLE)

    def thinned(self, rows: int = KEPT_ROWS) -> list[dict[str, Any]]:
        """The trail as records, steps of a short while together.

        A record has the most bytes and the least budget of its steps, the most sequences, and the
        mask (see `mask_code`) and kind that lasted longest.
        """
        if not self.moments:
            return []
        start, end = self.moments[0].time_s, self.moments[-1].end_s
        width = max(end - start, 1e-9) / rows
        groups: dict[int, list[Moment]] = {}
        for moment in self.moments:
            groups.setdefault(int((moment.time_s - start) / width), []).append(moment)
        return [_record(group) for group in groups.values()]


def _record(group: Sequence[Moment]) -> dict[str, Any]:
    worst = max(group, key=lambda m: m.peak_bytes - m.budget_bytes)
    return {
        "time_s": round(group[0].time_s, 4),
        "until_s": round(group[-1].end_s, 4),
        "kind": _longest((m.kind, m.duration_s) for m in group),
        "rows": max(m.rows for m in group),
        "length": max(m.length for m in group),
        "peak_bytes": worst.peak_bytes,
        "budget_bytes": worst.budget_bytes,
        "mask": _longest((mask_code(m.mask), m.duration_s) for m in group),
    }


def _longest(entries: Iterable[tuple[str, float]]) -> str:
    """The name that lasted longest."""
    held: dict[str, float] = {}
    for name, seconds in entries:
        held[name] = held.get(name, 0.0) + seconds
    return max(held, key=held.__getitem__)


def mask_code(mask: BlockMask) -> str:
    """A mask in few letters: a hexadecimal number whose bit i stands for removed block i."""
    return format(sum(1 << index for index in mask.indices), "x")


def mask_of_code(code: str) -> BlockMask:
    """The mask that `mask_code` wrote."""
    bits = int(code, 16)
    return BlockMask(frozenset(i for i in range(bits.bit_length()) if bits >> i & 1))

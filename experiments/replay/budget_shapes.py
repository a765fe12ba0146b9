"""Shapes of budgets: bytes that the runtime may take, as pure functions of time.

A budget is a step function: between two moments at which it changes it stays the same. The same
time gives the same bytes to whoever asks, however often, so several systems can be measured
under one budget. Times are seconds from the start of a replay or of a service.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from rap_env.errors import RapError

_SINE_LEVELS = 64
_BATCH_TENANTS = 256


class BudgetError(RapError, ValueError):
    """A budget whose settings or file make no sense."""


class Budget(ABC):
    """Bytes that may be taken at each time, constant between its changes."""

    @abstractmethod
    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """All changes up to a time, and perhaps some after it.

        Args:
            time_s: Seconds, at least 0.

        Returns:
            Moments in ascending order, the first of them 0, and the bytes from each of them on.
        """

    def at(self, time_s: float) -> int:
        """Bytes at a time; before the start those of the start."""
        times, levels = self.changes_until(max(0.0, time_s))
        return levels[max(0, bisect_right(times, time_s) - 1)]

    def least(self, start_s: float, end_s: float) -> int:
        """The least bytes from `start_s` to `end_s`, both included."""
        times, levels = self.changes_until(max(0.0, end_s))
        first = max(0, bisect_right(times, start_s) - 1)
        return min(levels[first : max(first + 1, bisect_right(times, end_s))])

    def most(self, start_s: float, end_s: float) -> int:
        """The most bytes from `start_s` to `end_s`, both included."""
        times, levels = self.changes_until(max(0.0, end_s))
        first = max(0, bisect_right(times, start_s) - 1)
        return max(levels[first : max(first + 1, bisect_right(times, end_s))])

    def next_change(self, time_s: float, horizon_s: float) -> float | None:
        """The first change after `time_s` and up to `horizon_s`, or None."""
        times, _ = self.changes_until(max(0.0, horizon_s))
        place = bisect_right(times, time_s)
        return times[place] if place < len(times) and times[place] <= horizon_s else None

    def pieces(self, start_s: float, end_s: float) -> Iterator[tuple[float, int]]:
        """How long each level holds between two times: (seconds, bytes), in order of time."""
        moment = start_s
        while moment < end_s:
            change = self.next_change(moment, end_s)
            until = end_s if change is None else change
            yield until - moment, self.at(moment)
            moment = until


@dataclass(frozen=True)
class ConstantBudget(Budget):
    """A budget that does not move.

    Attributes:
        budget_bytes: The bytes.

    Raises:
        BudgetError: They are below 1.
    """

    budget_bytes: int

    def __post_init__(self) -> None:
        _need_bytes(budget_bytes=self.budget_bytes)

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """None but the start."""
        return (0.0,), (self.budget_bytes,)


@dataclass(frozen=True)
class StepBudget(Budget):
    """A budget that jumps from level to level.

    Attributes:
        times_s: Moments of the jumps, ascending, the first of them 0.
        levels_bytes: Bytes from each of them on.
        period_s: Seconds after which it starts again; None keeps the last level for ever.

    Raises:
        BudgetError: The two differ in length, are empty, not ascending, or not above 0.
    """

    times_s: tuple[float, ...]
    levels_bytes: tuple[int, ...]
    period_s: float | None = None

    def __post_init__(self) -> None:
        times = tuple(float(time) for time in self.times_s)
        object.__setattr__(self, "times_s", times)
        object.__setattr__(self, "levels_bytes", tuple(int(level) for level in self.levels_bytes))
        ascending = all(a < b for a, b in itertools.pairwise(times))
        if not times or len(times) != len(self.levels_bytes) or times[0] != 0 or not ascending:
            raise BudgetError(
                "A budget of steps needs as many levels as times, and times that ascend from 0; "
                f"got the times {list(times)} and {len(self.levels_bytes)} levels."
            )
        _need_bytes(**{f"level {n}": level for n, level in enumerate(self.levels_bytes)})
        if self.period_s is not None and not times[-1] < self.period_s < math.inf:
            raise BudgetError(
                f"The period of a budget of steps must be longer than its last time "
                f"({times[-1]} s), not {self.period_s!r}."
            )

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """The steps, as often as the period asks for."""
        if self.period_s is None:
            return self.times_s, self.levels_bytes
        rounds = 1 + int(time_s // self.period_s)
        times = [n * self.period_s + time for n in range(rounds) for time in self.times_s]
        return times, self.levels_bytes * rounds


@dataclass(frozen=True)
class SineBudget(Budget):
    """A budget that swings, in steps of a 64th of its period.

    Attributes:
        mean_bytes: The middle.
        amplitude_bytes: How far it swings up and down from there.
        period_s: Seconds of one swing.
        phase_s: Seconds by which it is ahead: it starts at the middle, on its way up, with 0.

    Raises:
        BudgetError: The lowest point is below 1 byte, or the period not above 0.
    """

    mean_bytes: int
    amplitude_bytes: int
    period_s: float
    phase_s: float = 0.0

    def __post_init__(self) -> None:
        if self.amplitude_bytes < 0:
            raise BudgetError(f"The amplitude must be at least 0, not {self.amplitude_bytes}.")
        _need_bytes(**{"the lowest point of a sine": self.mean_bytes - self.amplitude_bytes})
        _need_positive(period_s=self.period_s)

    @cached_property
    def _levels(self) -> tuple[int, ...]:
        """Levels of one period, each that of the middle of its step."""
        step = self.period_s / _SINE_LEVELS
        angles = (
            2 * math.pi * ((n + 0.5) * step + self.phase_s) / self.period_s
            for n in range(_SINE_LEVELS)
        )
        return tuple(int(self.mean_bytes + self.amplitude_bytes * math.sin(a)) for a in angles)

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """All steps of all swings so far."""
        rounds = 1 + int(time_s // self.period_s)
        step = self.period_s / _SINE_LEVELS
        return [n * step for n in range(rounds * _SINE_LEVELS)], self._levels * rounds


@dataclass(frozen=True)
class CoTenantBudget(Budget):
    """What other tenants of a machine leave: they come at random, stay a while, and go.

    Tenants arrive as a Poisson process, each with one of the given sizes and an exponential stay.
    One that would leave less than the floor is turned away.

    Attributes:
        capacity_bytes: What there is without tenants.
        floor_bytes: What is always left.
        sizes_bytes: Sizes of tenants, each as likely.
        arrivals_per_minute: Mean rate of arrivals.
        mean_stay_s: Mean stay in seconds.
        seed: Seed of it all.

    Raises:
        BudgetError: A number is out of its range.
    """

    capacity_bytes: int
    floor_bytes: int
    sizes_bytes: tuple[int, ...]
    arrivals_per_minute: float
    mean_stay_s: float
    seed: int = 0
    _drawn: _Tenants = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes_bytes", tuple(int(size) for size in self.sizes_bytes))
        _need_bytes(floor_bytes=self.floor_bytes)
        if self.floor_bytes > self.capacity_bytes:
            raise BudgetError(
                f"The floor of a budget with co-tenants ({self.floor_bytes:,} bytes) must be at "
                f"most its capacity ({self.capacity_bytes:,} bytes)."
            )
        if not self.sizes_bytes:
            raise BudgetError("A budget with co-tenants needs a size of tenants at least.")
        _need_bytes(**{f"size {n} of a tenant": size for n, size in enumerate(self.sizes_bytes)})
        _need_positive(arrivals_per_minute=self.arrivals_per_minute, mean_stay_s=self.mean_stay_s)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise BudgetError(f"The seed of a budget must be at least 0, not {self.seed!r}.")
        object.__setattr__(self, "_drawn", _Tenants(self))

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """Arrivals and departures."""
        return self._drawn.until(time_s)


class _Tenants:
    """Draws tenants in order of arrival, as far as anybody asked; the draws do not depend on it."""

    def __init__(self, budget: CoTenantBudget) -> None:
        self._budget = budget
        self._rng = np.random.default_rng(budget.seed)
        self._until_s = 0.0
        self._stays: list[tuple[float, float, int]] = []  # arrival, departure, size
        self._changes: tuple[list[float], list[int]] = ([0.0], [budget.capacity_bytes])

    def until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        if time_s >= self._until_s:
            while time_s >= self._until_s:
                self._draw()
            self._changes = self._levels()
        return self._changes

    def _draw(self) -> None:
        budget = self._budget
        gaps = self._rng.exponential(60 / budget.arrivals_per_minute, _BATCH_TENANTS)
        stays = self._rng.exponential(budget.mean_stay_s, _BATCH_TENANTS)
        sizes = self._rng.choice(budget.sizes_bytes, _BATCH_TENANTS)
        for gap, stay, size in zip(gaps.tolist(), stays.tolist(), sizes.tolist(), strict=True):
            self._until_s += gap
            present = sum(held for _, end, held in self._stays if end > self._until_s)
            if budget.capacity_bytes - present - size >= budget.floor_bytes:
                self._stays.append((self._until_s, self._until_s + stay, size))

    def _levels(self) -> tuple[list[float], list[int]]:
        """Changes up to the last arrival.

        A departure after it is left out: it may still be preceded by tenants not drawn yet.
        """
        moves = [(0.0, 0), *[(start, size) for start, _, size in self._stays]]
        moves += [(end, -size) for _, end, size in self._stays if end <= self._until_s]
        times: list[float] = []
        levels: list[int] = []
        left = self._budget.capacity_bytes
        for moment, size in sorted(moves):
            left -= size
            times.append(moment)
            levels.append(left)
        return times, levels


def _need_bytes(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise BudgetError(f"A budget must be at least 1 byte, but {name} is {value}.")


def _need_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not 0 < value < math.inf:
            raise BudgetError(f"{name} of a budget must be above 0, not {value!r}.")

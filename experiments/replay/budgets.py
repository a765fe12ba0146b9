"""Moving memory budgets of a replay, from settings or from a recorded file.

A budget is a step function of time in seconds from the start of the replay, constant between its
changes. It is deterministic, so several systems can be measured under the same budget.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import RapError
from rap_env.specs import check_settings, split_spec

UNITS = ("fraction", "bytes")
COLUMNS = ("time_s", "budget_bytes")
"""Fields of a recorded budget."""

Scale = Callable[[Any], int]
"""Converts a configured level to bytes."""

_SINE_STEPS = 64
_TENANTS_PER_DRAW = 256


class BudgetError(RapError, ValueError):
    """The settings or the file of a budget are invalid."""


class Budget(ABC):
    """Bytes that a system may use at each time, constant between changes."""

    @abstractmethod
    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """Return all changes up to a time, and possibly some later ones.

        Returns:
            Times in ascending order, the first of them 0, and the bytes from each time on.
        """

    def at(self, time_s: float) -> int:
        """Bytes at a time; before the start, those at the start."""
        times, levels = self.changes_until(max(0.0, time_s))
        return levels[max(0, bisect_right(times, time_s) - 1)]

    def least(self, start_s: float, end_s: float) -> int:
        """Minimum of the bytes from `start_s` to `end_s`, both included."""
        return min(self._between(start_s, end_s))

    def most(self, start_s: float, end_s: float) -> int:
        """Maximum of the bytes from `start_s` to `end_s`, both included."""
        return max(self._between(start_s, end_s))

    def _between(self, start_s: float, end_s: float) -> Sequence[int]:
        times, levels = self.changes_until(max(0.0, end_s))
        first = max(0, bisect_right(times, start_s) - 1)
        return levels[first : max(first + 1, bisect_right(times, end_s))]

    def next_change(self, time_s: float, horizon_s: float) -> float | None:
        """Time of the first change after `time_s` and up to `horizon_s`, or None."""
        times, _ = self.changes_until(max(0.0, horizon_s))
        index = bisect_right(times, time_s)
        return times[index] if index < len(times) and times[index] <= horizon_s else None

    def pieces(self, start_s: float, end_s: float) -> Iterator[tuple[float, int]]:
        """Yield how long each level holds between two times: (seconds, bytes), in order."""
        time = start_s
        while time < end_s:
            change = self.next_change(time, end_s)
            until = end_s if change is None else change
            yield until - time, self.at(time)
            time = until


@dataclass(frozen=True)
class StepBudget(Budget):
    """A budget with given levels.

    Attributes:
        times_s: Times of the changes, ascending, the first of them 0.
        levels_bytes: Bytes from each time on.
        period_s: Seconds after which the steps repeat; None keeps the last level.

    Raises:
        BudgetError: Times and levels differ in length or are empty, times do not ascend from 0, or
            a level is below 1.
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
                "A step budget needs as many levels as times, and times that ascend from 0; "
                f"got the times {list(times)} and {len(self.levels_bytes)} levels."
            )
        _need_bytes(**{f"level {n}": level for n, level in enumerate(self.levels_bytes)})
        if self.period_s is not None and not times[-1] < self.period_s < math.inf:
            raise BudgetError(
                f"The period of a step budget must be longer than its last time "
                f"({times[-1]} s), not {self.period_s!r}."
            )

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """Return the steps, repeated after each period."""
        if self.period_s is None:
            return self.times_s, self.levels_bytes
        rounds = 1 + int(time_s // self.period_s)
        times = [n * self.period_s + time for n in range(rounds) for time in self.times_s]
        return times, self.levels_bytes * rounds


def sine_budget(
    mean_bytes: int, amplitude_bytes: int, period_s: float, phase_s: float = 0.0
) -> StepBudget:
    """Make a sinusoidal budget, in steps of a 64th of its period.

    Args:
        mean_bytes: Mean of the budget.
        amplitude_bytes: Largest deviation from the mean.
        period_s: Seconds of one period.
        phase_s: Seconds by which the sine is ahead; with 0 it starts at the mean and rises.

    Raises:
        BudgetError: The minimum is below 1 byte, or the period is not above 0.
    """
    if amplitude_bytes < 0:
        raise BudgetError(f"The amplitude must be at least 0, not {amplitude_bytes}.")
    _need_bytes(**{"the minimum of a sine": mean_bytes - amplitude_bytes})
    _need_positive(period_s=period_s)
    times = [n * period_s / _SINE_STEPS for n in range(_SINE_STEPS)]
    middle_s = period_s / _SINE_STEPS / 2  # of a step
    angles = [2 * math.pi * (time + middle_s + phase_s) / period_s for time in times]
    levels = [int(mean_bytes + amplitude_bytes * math.sin(angle)) for angle in angles]
    return StepBudget(tuple(times), tuple(levels), period_s)


@dataclass(frozen=True)
class CoTenantBudget(Budget):
    """Memory that other tenants of a machine leave free.

    Tenants arrive as a Poisson process, each with one of the given sizes and an exponentially
    distributed stay. Without tenants the capacity is free; a tenant that would leave less than the
    floor is rejected.

    Raises:
        BudgetError: A setting is out of range.
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
            raise BudgetError("A budget with co-tenants needs at least one tenant size.")
        _need_bytes(**{f"tenant size {n}": size for n, size in enumerate(self.sizes_bytes)})
        _need_positive(arrivals_per_minute=self.arrivals_per_minute, mean_stay_s=self.mean_stay_s)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise BudgetError(f"The seed of a budget must be at least 0, not {self.seed!r}.")
        object.__setattr__(self, "_drawn", _Tenants(self))

    def changes_until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """Return the changes made by arrivals and departures."""
        return self._drawn.until(time_s)


class _Tenants:
    """Samples tenants in order of arrival, lazily; the samples do not depend on the queries."""

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
        gaps = self._rng.exponential(60 / budget.arrivals_per_minute, _TENANTS_PER_DRAW)
        stays = self._rng.exponential(budget.mean_stay_s, _TENANTS_PER_DRAW)
        sizes = self._rng.choice(budget.sizes_bytes, _TENANTS_PER_DRAW)
        for gap, stay, size in zip(gaps.tolist(), stays.tolist(), sizes.tolist(), strict=True):
            self._until_s += gap
            present = sum(held for _, end, held in self._stays if end > self._until_s)
            if budget.capacity_bytes - present - size >= budget.floor_bytes:
                self._stays.append((self._until_s, self._until_s + stay, size))

    def _levels(self) -> tuple[list[float], list[int]]:
        """Return the changes up to the last sampled arrival.

        Later departures are left out: tenants that are not sampled yet may arrive before them.
        """
        moves = [(0.0, 0), *[(start, size) for start, _, size in self._stays]]
        moves += [(end, -size) for _, end, size in self._stays if end <= self._until_s]
        times: list[float] = []
        levels: list[int] = []
        left = self._budget.capacity_bytes
        for time, size in sorted(moves):
            left -= size
            times.append(time)
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


def read_budget(path: str | Path) -> StepBudget:
    """Read a recorded budget: a CSV file, or JSON lines if the name ends in ``.jsonl``.

    Args:
        path: A file with the fields `COLUMNS` in ascending order of time; its first time becomes
            0.

    Raises:
        BudgetError: The file is missing, malformed or empty, or its times do not ascend.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(
            f"The budget {path} cannot be read ({error}); give a CSV or JSON-lines file with "
            f"{' and '.join(COLUMNS)}."
        ) from None
    in_json = path.suffix == ".jsonl"
    rows = _json_rows(text) if in_json else enumerate(csv.DictReader(text.splitlines()), start=2)
    points = [_point(path, number, row) for number, row in rows]
    if not points:
        raise BudgetError(f"The budget {path} holds no level.")
    start = points[0][0]
    return StepBudget(
        tuple(time - start for time, _ in points), tuple(level for _, level in points)
    )


def _point(path: Path, number: int, row: Any) -> tuple[float, int]:
    try:
        time, level = float(row[COLUMNS[0]]), int(row[COLUMNS[1]])
        if math.isfinite(time):
            return time, level
    except (KeyError, TypeError, ValueError):
        pass
    raise BudgetError(
        f"Line {number} of the budget {path} must hold {COLUMNS[0]} in seconds and "
        f"{COLUMNS[1]} as an integer, not {row!r}."
    )


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, line


def _constant(scale: Scale, *, level: Any) -> Budget:
    return StepBudget((0.0,), (scale(level),))


def _step(scale: Scale, *, times_s: Any, levels: Any, period_s: float | None = None) -> Budget:
    return StepBudget(tuple(times_s), tuple(map(scale, levels)), period_s)


def _sine(
    scale: Scale, *, mean: Any, amplitude: Any, period_s: float, phase_s: float = 0.0
) -> Budget:
    return sine_budget(scale(mean), scale(amplitude), period_s, phase_s)


def _cotenants(scale: Scale, *, capacity: Any, floor: Any, sizes: Any, **others: Any) -> Budget:
    return CoTenantBudget(scale(capacity), scale(floor), tuple(map(scale, sizes)), **others)


def _file(_scale: Scale, *, path: str) -> Budget:
    return read_budget(path)


BUDGETS: dict[str, tuple[Callable[..., Budget], Sequence[str]]] = {
    "constant": (_constant, ("level",)),
    "step": (_step, ("times_s", "levels", "period_s")),
    "sine": (_sine, ("mean", "amplitude", "period_s", "phase_s")),
    "cotenants": (
        _cotenants,
        ("capacity", "floor", "sizes", "arrivals_per_minute", "mean_stay_s", "seed"),
    ),
    "file": (_file, ("path",)),
}
"""Factory of each kind of budget, and the names of its settings."""


def make_budget(settings: str | Mapping[str, Any], reference_bytes: int) -> Budget:
    """Make the budget that settings describe.

    Args:
        settings: A dict with a ``name`` of `BUDGETS`, the ``unit`` of its levels (``"fraction"``
            of the reference, which is the default, or ``"bytes"``), and its own settings. A
            recorded file is always in bytes.
        reference_bytes: Bytes of the fraction 1.

    Raises:
        UnknownNameError: The budget or one of its settings is unknown.
        BudgetError: A setting is missing or out of range.
    """
    name, own = split_spec(settings, "budget", BUDGETS)
    make, known = BUDGETS[name]
    unit = own.pop("unit", "fraction")
    check_settings(own, f"the budget {name!r}", [*known, "unit"])
    if unit not in UNITS:
        raise BudgetError(f"The unit of a budget is {' or '.join(UNITS)}, not {unit!r}.")
    factor = reference_bytes if unit == "fraction" else 1

    def scale(value: Any) -> int:
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if not number or not 0 <= value < math.inf:
            raise BudgetError(
                f"A level of the budget {name!r} must be a number of at least 0, not {value!r}."
            )
        return int(factor * value)

    try:
        return make(scale, **own)
    except TypeError as error:
        raise BudgetError(
            f"The budget {name!r} lacks a setting or has one of a wrong type ({error}); its "
            f"settings are {', '.join(known)}."
        ) from None

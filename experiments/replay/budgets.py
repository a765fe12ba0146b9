"""Moving memory budgets of a replay: step functions of time, from settings or a recorded file."""

from __future__ import annotations

import csv
import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import RapError
from rap_env.specs import split_spec

COLUMNS = ("time_s", "budget_bytes")
"""Fields of a recorded budget."""

_SINE_STEPS = 64
_DRAWN_S = 24 * 3600.0  # seconds for which co-tenants are drawn; then the last level stays
_TENANTS_PER_DRAW = 256

Scale = Callable[[Any], int]
"""Converts a level of the settings to bytes."""


class BudgetError(RapError, ValueError):
    """The settings or the file of a budget are invalid."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a system may use at each time, constant between changes.

    Attributes:
        times_s: Times of the changes in seconds from the start, ascending, the first of them 0.
        levels_bytes: Bytes from each time on.
        period_s: Seconds after which the steps repeat; None keeps the last level.

    Raises:
        BudgetError: Times and levels differ in length or are empty, times do not ascend from 0, or
            a level is below 1.
    """

    times_s: Sequence[float]
    levels_bytes: Sequence[int]
    period_s: float | None = None

    def __post_init__(self) -> None:
        times, levels = self.times_s, self.levels_bytes
        ascending = all(a < b for a, b in itertools.pairwise(times))
        if not times or len(times) != len(levels) or times[0] != 0 or not ascending:
            raise BudgetError(
                "A budget needs as many levels as times, and times that ascend from 0; got the "
                f"times {list(times)} and {len(levels)} levels."
            )
        if min(levels) < 1:
            raise BudgetError(f"A budget must be at least 1 byte, not {min(levels)}.")
        if self.period_s is not None and not times[-1] < self.period_s < math.inf:
            raise BudgetError(
                f"The period of a budget must be longer than its last time ({times[-1]} s), not "
                f"{self.period_s!r}."
            )

    def at(self, time_s: float) -> int:
        """Bytes at a time; before the start, those at the start."""
        return self._between(time_s, time_s)[0]

    def least(self, start_s: float, end_s: float) -> int:
        """Minimum of the bytes from `start_s` to `end_s`, both included."""
        return min(self._between(start_s, end_s))

    def most(self, start_s: float, end_s: float) -> int:
        """Maximum of the bytes from `start_s` to `end_s`, both included."""
        return max(self._between(start_s, end_s))

    def next_change(self, time_s: float, horizon_s: float) -> float | None:
        """Time of the first change after `time_s` and up to `horizon_s`, or None."""
        times, _ = self._until(horizon_s)
        index = bisect_right(times, time_s)
        return times[index] if index < len(times) and times[index] <= horizon_s else None

    def _between(self, start_s: float, end_s: float) -> Sequence[int]:
        times, levels = self._until(end_s)
        first = max(0, bisect_right(times, start_s) - 1)
        return levels[first : max(first + 1, bisect_right(times, end_s))]

    def _until(self, time_s: float) -> tuple[Sequence[float], Sequence[int]]:
        """All changes up to a time, and possibly some later ones."""
        if self.period_s is None:
            return self.times_s, self.levels_bytes
        rounds = 1 + int(max(0.0, time_s) // self.period_s)
        times = [n * self.period_s + time for n in range(rounds) for time in self.times_s]
        return times, list(self.levels_bytes) * rounds


def constant_budget(scale: Scale, level: float = 0.85) -> Budget:
    """A budget that does not change."""
    return Budget([0.0], [scale(level)])


def step_budget(
    scale: Scale,
    times_s: Sequence[float] = (0, 20, 40, 50),
    levels: Sequence[float] = (1.05, 0.8, 0.9, 0.75),
    period_s: float | None = 60,
) -> Budget:
    """A budget of given levels; without a period the last one stays."""
    return Budget(list(times_s), list(map(scale, levels)), period_s)


def sine_budget(
    scale: Scale,
    mean: float = 0.9,
    amplitude: float = 0.15,
    period_s: float = 60,
    phase_s: float = 0,
) -> Budget:
    """A sinusoidal budget, in steps of a 64th of its period; with phase 0 it rises at the start."""
    _need_positive(period_s=period_s)
    times = [n * period_s / _SINE_STEPS for n in range(_SINE_STEPS)]
    middle_s = period_s / _SINE_STEPS / 2  # of a step
    angles = [2 * math.pi * (time + middle_s + phase_s) / period_s for time in times]
    middle, swing = scale(mean), scale(amplitude)
    return Budget(times, [int(middle + swing * math.sin(angle)) for angle in angles], period_s)


def cotenant_budget(
    scale: Scale,
    capacity: float = 1.05,
    floor: float = 0.74,
    sizes: Sequence[float] = (0.05, 0.1, 0.15),
    arrivals_per_minute: float = 6,
    mean_stay_s: float = 15,
    seed: int = 0,
) -> Budget:
    """Memory that other tenants of a machine leave free.

    Tenants arrive as a Poisson process, each with one of the sizes and an exponentially distributed
    stay. Without tenants the capacity is free; a tenant that would leave less than the floor is
    rejected.
    """
    free, least, choices = scale(capacity), scale(floor), list(map(scale, sizes))
    if not choices or not min(least, *choices) >= 1 or least > free:
        raise BudgetError(
            f"A budget with co-tenants needs sizes of at least 1 byte and a floor from 1 byte to "
            f"its capacity; got the sizes {choices}, the floor {least} and the capacity {free}."
        )
    _need_positive(arrivals_per_minute=arrivals_per_minute, mean_stay_s=mean_stay_s)
    rng = np.random.default_rng(seed)
    now, moves = 0.0, [(0.0, 0)]
    present: list[tuple[float, int]] = []  # end and size of each tenant
    while now < _DRAWN_S:
        gaps = rng.exponential(60 / arrivals_per_minute, _TENANTS_PER_DRAW)
        stays = rng.exponential(mean_stay_s, _TENANTS_PER_DRAW)
        drawn = rng.choice(choices, _TENANTS_PER_DRAW)
        for gap, stay, size in zip(gaps.tolist(), stays.tolist(), drawn.tolist(), strict=True):
            now += gap
            present = [tenant for tenant in present if tenant[0] > now]
            if free - sum(size for _, size in present) - size >= least:
                present.append((now + stay, size))
                moves += [(now, size), (now + stay, -size)]
    moves.sort()
    levels = [free - used for used in itertools.accumulate(size for _, size in moves)]
    return Budget([time for time, _ in moves], levels)


def read_budget(_scale: Scale, path: str) -> Budget:
    """Read a recorded budget: a CSV file, or JSON lines if the name ends in ``.jsonl``.

    Args:
        path: A file with the fields `COLUMNS` in ascending order of time; its first time becomes 0.

    Raises:
        BudgetError: The file is missing, malformed or empty, or its times do not ascend.
    """
    file = Path(path).expanduser()
    rows: Iterable[Any]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines) if file.suffix == ".jsonl" else csv.DictReader(lines)
        points = [(float(row["time_s"]), int(row["budget_bytes"])) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BudgetError(
            f"The budget {path} cannot be read ({error!r}); give a CSV or JSON-lines file with "
            f"{' and '.join(COLUMNS)}."
        ) from None
    start = points[0][0] if points else 0.0
    return Budget([time - start for time, _ in points], [level for _, level in points])


BUDGETS: dict[str, Callable[..., Budget]] = {
    "constant": constant_budget,
    "step": step_budget,
    "sine": sine_budget,
    "cotenants": cotenant_budget,
    "file": read_budget,
}
"""What makes each kind of budget from its settings."""


def make_budget(settings: str | Mapping[str, Any], reference_bytes: int) -> Budget:
    """Make the budget that settings describe.

    Args:
        settings: A name of `BUDGETS`, or a dict with it, the ``unit`` of its levels
            (``"fraction"`` of the reference, which is the default, or ``"bytes"``), and its own
            settings. A recorded file is always in bytes.
        reference_bytes: Bytes of the fraction 1.

    Raises:
        UnknownNameError: The budget is unknown.
        BudgetError: A setting is unknown, missing or out of range.
    """
    name, own = split_spec(settings, "budget", BUDGETS)
    unit = own.pop("unit", "fraction")
    if unit not in ("fraction", "bytes"):
        raise BudgetError(f"The unit of a budget is fraction or bytes, not {unit!r}.")

    def scale(value: float) -> int:
        return int(value * (reference_bytes if unit == "fraction" else 1))

    try:
        return BUDGETS[name](scale, **own)
    except BudgetError:
        raise
    except (TypeError, ValueError) as error:
        raise BudgetError(
            f"The budget {name!r} lacks a setting or has a wrong one: {error}."
        ) from None


def _need_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise BudgetError(f"{name} of a budget must be above 0, not {value!r}.")

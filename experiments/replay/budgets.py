"""Moving memory budgets of a replay: what co-tenants leave free, or steps of a recorded file."""

from __future__ import annotations

import csv
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import RapError
from rap_env.specs import split_spec

_DRAWN_S = 24 * 3600.0  # seconds for which co-tenants are drawn; then the last level stays
_TENANTS_PER_DRAW = 256

Scale = Callable[[Any], int]
"""Converts a level of the settings to bytes."""


class BudgetError(RapError, ValueError):
    """The settings or the file of a budget are invalid."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a system may use at each time, constant between changes; the last level stays.

    Attributes:
        times_s: Times of the changes in seconds from the start, ascending, the first of them 0.
        levels_bytes: Bytes from each time on.

    Raises:
        BudgetError: Times and levels differ in length or are empty, times do not ascend from 0, or
            a level is below 1.
    """

    times_s: Sequence[float]
    levels_bytes: Sequence[int]

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
        index = bisect_right(self.times_s, time_s)
        later = self.times_s[index : index + 1]
        return later[0] if later and later[0] <= horizon_s else None

    def _between(self, start_s: float, end_s: float) -> Sequence[int]:
        first = max(0, bisect_right(self.times_s, start_s) - 1)
        return self.levels_bytes[first : max(first + 1, bisect_right(self.times_s, end_s))]


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
    if not (0 < arrivals_per_minute < math.inf and 0 < mean_stay_s < math.inf):
        raise BudgetError(
            "arrivals_per_minute and mean_stay_s of a budget must be above 0, not "
            f"{arrivals_per_minute!r} and {mean_stay_s!r}."
        )
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
    """Read a recorded budget from a CSV file; its first time becomes 0.

    Args:
        path: A file with the columns ``time_s``, in ascending order, and ``budget_bytes``.

    Raises:
        BudgetError: The file is missing, malformed or empty, or its times do not ascend.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        rows = csv.DictReader(lines)
        points = [(float(row["time_s"]), int(row["budget_bytes"])) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BudgetError(
            f"The budget {path} cannot be read ({error!r}); give a CSV file with time_s and "
            "budget_bytes."
        ) from None
    start = points[0][0] if points else 0.0
    return Budget([time - start for time, _ in points], [level for _, level in points])


BUDGETS: dict[str, Callable[..., Budget]] = {"cotenants": cotenant_budget, "file": read_budget}
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

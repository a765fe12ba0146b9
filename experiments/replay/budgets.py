"""Budgets that move, from settings or from a recorded file.

See `experiments.replay.budget_shapes` for what each of them does.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.replay.budget_shapes import (
    Budget,
    BudgetError,
    ConstantBudget,
    CoTenantBudget,
    SineBudget,
    StepBudget,
)
from rap_env.specs import check_settings, split_spec

__all__ = [
    "BUDGETS",
    "COLUMNS",
    "UNITS",
    "Budget",
    "BudgetError",
    "CoTenantBudget",
    "ConstantBudget",
    "SineBudget",
    "StepBudget",
    "make_budget",
    "read_budget",
]

UNITS = ("fraction", "bytes")
COLUMNS = ("time_s", "budget_bytes")
"""Fields of a recorded budget."""

Scale = Callable[[Any], int]
"""From a level as it is set to bytes."""


def read_budget(path: str | Path) -> StepBudget:
    """A recorded budget: a CSV file, or JSON lines where the name ends in ``.jsonl``.

    Args:
        path: A file with the fields `COLUMNS` in ascending order of time; its first time is taken
            as 0.

    Raises:
        BudgetError: It is missing, malformed or empty, or its times do not ascend.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(
            f"The budget {path} cannot be read ({error}); give a CSV or JSON-lines file with "
            f"{' and '.join(COLUMNS)}."
        ) from None
    rows = _json_rows if path.suffix == ".jsonl" else _csv_rows
    points = [_point(path, number, row) for number, row in rows(text)]
    if not points:
        raise BudgetError(f"The budget {path} holds no level.")
    start = points[0][0]
    return StepBudget(
        tuple(moment - start for moment, _ in points), tuple(level for _, level in points)
    )


def _point(path: Path, number: int, row: Any) -> tuple[float, int]:
    try:
        moment, level = float(row[COLUMNS[0]]), int(row[COLUMNS[1]])
        if math.isfinite(moment):
            return moment, level
    except (KeyError, TypeError, ValueError):
        pass
    raise BudgetError(
        f"Line {number} of the budget {path} should hold {COLUMNS[0]} in seconds and "
        f"{COLUMNS[1]} as a whole number, not {row!r}."
    )


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(csv.DictReader(text.splitlines()), start=2)


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, line


def _constant(scale: Scale, *, level: Any) -> Budget:
    return ConstantBudget(scale(level))


def _step(scale: Scale, *, times_s: Any, levels: Any, period_s: float | None = None) -> Budget:
    return StepBudget(tuple(times_s), tuple(map(scale, levels)), period_s)


def _sine(
    scale: Scale, *, mean: Any, amplitude: Any, period_s: float, phase_s: float = 0.0
) -> Budget:
    return SineBudget(scale(mean), scale(amplitude), period_s, phase_s)


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
"""What makes each kind of budget, and the names of its settings."""


def make_budget(settings: str | Mapping[str, Any], reference_bytes: int) -> Budget:
    """The budget that settings describe.

    Args:
        settings: A dict with a ``name`` of `BUDGETS`, the ``unit`` of its levels (``"fraction"``
            of the reference, which is the default, or ``"bytes"``), and its own settings. A
            recorded file is always in bytes.
        reference_bytes: What fractions are fractions of.

    Raises:
        UnknownNameError: There is no such budget, or it has no such setting.
        BudgetError: A setting is missing or out of its range.
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

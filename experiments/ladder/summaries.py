"""The rows of one ladder, by method, request and budget, and all records of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from experiments.ladder.records import (
    LADDER_FILE,
    LLAMA_CPP_FILE,
    SHIPPED_FILE,
    LadderRow,
    LlamaCppRow,
    ShippedRow,
    shapes_of,
)

Shape = tuple[int, int]
"""Batch size and sequence length in tokens."""


class Ladder:
    """The rows of one ladder.

    Attributes:
        rows: All rows.
        shapes: Requests.
    """

    def __init__(self, rows: Sequence[LadderRow]) -> None:
        self.rows = list(rows)
        self.shapes = shapes_of(rows)

    def at(self, method: str, shape: Shape) -> list[LadderRow]:
        """Rows of one method and request, the largest first."""
        found = [row for row in self.rows if (row.method, row.shape) == (method, shape)]
        return sorted(found, key=lambda row: -row.held_bytes)

    @cached_property
    def settings(self) -> list[str]:
        """Names of the uniform settings, the largest first."""
        return [row.name for row in self.at("uniform", self.shapes[0])]

    @cached_property
    def native(self) -> str:
        """What unquantised weights and caches are, such as ``bf16``."""
        dtypes = {str(row.provenance["depends_on"].get("dtype", "")) for row in self.rows}
        return dtypes.pop().replace("bfloat", "bf") if len(dtypes) == 1 else "native"

    def label(self, name: str) -> str:
        """Name of a uniform setting, with the dtype in the place of ``native``."""
        return name.replace("native", self.native)

    def fractions(self) -> list[float]:
        """Budgets of the policies, the largest first."""
        return sorted({row.budget_fraction for row in self.rows if row.budget_fraction})[::-1]

    def policy_row(self, method: str, shape: Shape, fraction: float) -> LadderRow | None:
        """The row of a policy at a budget, if there is one."""
        found = [row for row in self.at(method, shape) if row.budget_fraction == fraction]
        return found[0] if found else None


@dataclass(frozen=True)
class LadderRecords:
    """All records of the ladder under one comparison's folder.

    Attributes:
        ladder: The plans; None before ``experiments.ladder``.
        llama_cpp: Settings of llama.cpp.
        shipped: Costs of levels of several models.
    """

    ladder: Ladder | None = None
    llama_cpp: list[LlamaCppRow] = field(default_factory=list)
    shipped: list[ShippedRow] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ladder or self.llama_cpp or self.shipped)


def read_ladder(root: Path) -> LadderRecords:
    """Read the records under a comparison's folder; empty if there are none."""
    rows = LadderRow.read(root / "ladder" / LADDER_FILE)
    return LadderRecords(
        Ladder(rows) if rows else None,
        LlamaCppRow.read(root / "llama_cpp" / LLAMA_CPP_FILE),
        ShippedRow.read(root / "shipped" / SHIPPED_FILE),
    )

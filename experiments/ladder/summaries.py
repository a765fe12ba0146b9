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
from rap_env.artifacts import load_artifact

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
        [*ShippedRow.read(root / "shipped" / SHIPPED_FILE), *second_models(root)],
    )


_FORMATS = {"gemma3-270m": "Q4_K_M"}
_ITEMS = {"weights of all blocks": "weights", "embeddings": "embeddings", "all caches": "caches"}
_NORMAL = 1.959964  # half-width of a 95 % interval in standard errors


def second_models(root: Path) -> list[ShippedRow]:
    """Rows of ``experiments.ladder.second_model``: a JSON file for each model in the folder.

    Its records have standard errors instead of windows, so intervals are normal ones.
    """
    found = []
    for path in sorted(root.glob("*.json")):
        body = load_artifact(path, "costs of levels", 1)
        for row in body["rows"]:
            if row["items"] not in _ITEMS:
                continue
            half = _NORMAL * row["standard_error"]
            found.append(
                ShippedRow(
                    model=body["model"],
                    shipped=_FORMATS.get(body["model"], "unknown"),
                    what=_ITEMS[row["items"]],
                    level=row["level"],
                    rounding=_rounding(row["quantiser"], row["level"]),
                    saved=0.0,
                    text=body["text"],
                    window_tokens=body["window_tokens"],
                    loss=row["delta_nll"],
                    loss_ci_low=row["delta_nll"] - half,
                    loss_ci_high=row["delta_nll"] + half,
                    window_losses=[],
                    provenance={"depends_on": {}, "git": body["git"]},
                )
            )
    return found


def _rounding(quantiser: str, level: str) -> str:
    """How weights were quantised, as a `ShippedRow` says it; int8 is always rounded to nearest."""
    if quantiser == "rounding to nearest" and level != "int8":
        return "nearest"
    return "calibrated" if quantiser == "GPTQ" else "fitted" if quantiser else ""

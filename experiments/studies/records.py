"""Records of the studies of calibration text: masks with their ΔNLL, and removal orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.records import CellRecord, Record

_NAME, _RERUN = "A study's record", "run the study again"


@dataclass(frozen=True)
class StudyRow(CellRecord):
    """One mask on one report text.

    For the other fields see `CellRecord`.

    Attributes:
        study: ``"stability"``, ``"text"`` or ``"overfitting"``.
        method: Method that chose the mask: a baseline, or a trained agent's run folder.
        searched_on: Name of the text that the mask was searched on, or on which the importance
            was measured that a trained policy observed.
        seed: Seed of that text's windows.
        tokens: Tokens of that text.
        loss_calibration: ΔNLL on the text that the mask was searched on.
        text: Name of the report text.
        evaluations: Masks scored for the choice, including stored scores and those of an order
            that serves all requests.
        provenance: ``{"depends_on": hashes and settings, "searched_on": the text, "git": ...}``.
    """

    study: str
    method: str
    searched_on: str
    seed: int
    tokens: int
    request: dict[str, int]
    budget_fraction: float
    budget_bytes: int
    peak_bytes: int
    mask: list[str]
    loss_calibration: float
    text: str
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]
    evaluations: int
    provenance: dict[str, Any] = field(default_factory=dict)

    record_name, rerun = _NAME, _RERUN
    identity = ("method", "searched_on", "seed", "cell", "text")


@dataclass(frozen=True)
class OrderRow(Record):
    """The removal order of all blocks by importance on one text.

    Attributes:
        method: ``"one_shot"`` or ``"gsi"``.
        searched_on: Name of the text.
        seed: Seed of its windows.
        tokens: Its tokens.
        order: Names of all blocks, least important first.
        measured: Number of first blocks that were removed one after the other; the others
            follow by their last measured ΔNLL. All blocks for ``one_shot``.
        values: Importance by block index, (2L,): ΔNLL without the block alone, nats per token
            (``one_shot``), or its position in the order (``gsi``).
        evaluations: Masks scored, including stored scores.
        provenance: As in `StudyRow`.
    """

    method: str
    searched_on: str
    seed: int
    tokens: int
    order: list[str]
    measured: int
    values: list[float]
    evaluations: int
    provenance: dict[str, Any] = field(default_factory=dict)

    record_name, rerun = _NAME, _RERUN
    identity = ("method", "searched_on", "seed")


def search_evaluations(rows: list[StudyRow], *, per_cell: bool) -> int:
    """Count the masks scored by all searches; a search that served several rows counts once.

    A search serves a single cell with `per_cell`, else all of them.
    """
    searches = {
        (row.searched_on, row.seed, row.tokens, "" if not per_cell else (row.method, row.cell)):
        row.evaluations
        for row in rows
    }  # fmt: skip
    return sum(searches.values())

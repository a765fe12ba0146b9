"""Records of the studies of calibration text: which mask a text led to, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.records import Record
from experiments.config.common import Cell
from rap_env.artifacts import digest


class _StudyRecord(Record):
    record_name = "A study's record"
    rerun = "run the study again"


@dataclass(frozen=True)
class StudyRow(_StudyRecord):
    """One mask on one report text.

    Losses are in nats per token: the mask's NLL minus the dense model's.

    Attributes:
        study: ``"stability"``, ``"text"`` or ``"overfitting"``.
        method: How the mask was chosen: a baseline, or the name of a trained agent's run folder.
        searched_on: Name of the text that it was searched on, or that a trained policy's
            importance was measured on.
        seed: Seed of that text's windows.
        tokens: Tokens of that text.
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        budget_fraction: Budget as a share of the dense peak.
        budget_bytes: The budget.
        peak_bytes: Peak bytes of the mask under the request.
        mask: Names of the removed blocks.
        loss_calibration: Loss on the text that it was searched on.
        text: Name of the report text.
        loss: Mean over the windows of the report text.
        loss_ci_low: Lower end of its 95 % interval over windows.
        loss_ci_high: Upper end.
        window_losses: Loss of each window of the report text, (windows,).
        evaluations: Masks whose score the choice needed, stored ones and those of an order that
            serves all requests included.
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

    @property
    def cell(self) -> Cell:
        """Batch size, sequence length in tokens and budget fraction."""
        return self.request["batch_size"], self.request["seq_len_tokens"], self.budget_fraction

    @property
    def key(self) -> str:
        """What makes two rows the same result."""
        depends_on = self.provenance.get("depends_on", {})
        return row_key(self.method, self.searched_on, self.seed, self.cell, self.text, depends_on)


@dataclass(frozen=True)
class OrderRow(_StudyRecord):
    """The order of importance on one text.

    Attributes:
        method: ``"one_shot"`` or ``"gsi"``.
        searched_on: Name of the text.
        seed: Seed of its windows.
        tokens: Its tokens.
        order: Names of all blocks, least important first.
        measured: How many of the first were really removed one after the other; the others
            follow by their last known loss. All of them for ``one_shot``.
        values: What blocks are compared by, in ascending order of index, (2L,): the loss
            without the block alone, nats per token (``one_shot``), or its place in the order.
        evaluations: Masks whose score it needed, stored ones included.
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

    @property
    def key(self) -> str:
        """What makes two orders the same result."""
        depends_on = self.provenance.get("depends_on", {})
        return digest([self.method, self.searched_on, self.seed, depends_on])


def row_key(
    method: str,
    searched_on: str,
    seed: int,
    cell: Cell,
    text: str,
    depends_on: Mapping[str, Any],
) -> str:
    """As `StudyRow.key`, known before the mask is searched."""
    return digest([method, searched_on, seed, *cell, text, dict(depends_on)])


def search_evaluations(rows: list[StudyRow], *, per_cell: bool) -> int:
    """Masks whose score all searches together needed; what served several rows counts once.

    Args:
        rows: The rows.
        per_cell: Whether each request was searched for anew, or an order served all of them.
    """
    searches = {
        (row.searched_on, row.seed, row.tokens, "" if not per_cell else (row.method, row.cell)):
        row.evaluations
        for row in rows
    }  # fmt: skip
    return sum(searches.values())

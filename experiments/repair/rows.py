"""Rows of ``repair.jsonl``: what stubs win back, for each request, budget and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.records import Record
from rap_env.artifacts import digest

STUDIES = ("grid", "tokens", "domain", "alone")


@dataclass(frozen=True)
class RepairRow(Record):
    """One repair, request, budget and report text: a line of ``repair.jsonl``.

    Losses are in nats per token: NLL of the repaired mask less the dense model's.

    Attributes:
        study: ``"grid"``: every repair with a search of its own; ``"tokens"`` and ``"domain"``:
            libraries fitted on other amounts and kinds of text, under the masks of the grid's
            library; ``"alone"``: one fitted on one kind of text, with a search of its own.
        repair: ``"none"``, ``"library"``, ``"distilled"`` or ``"per_mask"``.
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        budget_fraction: Budget as a share of the dense peak.
        budget_bytes: The budget.
        peak_bytes: Peak bytes of the mask, stubs included.
        text: Name of the report text.
        fitted_on: Names of the texts that stubs were fitted on; empty without stubs.
        fit_tokens: How many tokens that was.
        mean_rank: Mean rank of the stubs.
        mask: Names of the removed blocks.
        mask_from: The repair whose greedy search chose the mask.
        loss: Mean over the windows of the report text.
        loss_ci_low: Lower end of its 95 % interval over windows.
        loss_ci_high: Upper end.
        window_losses: Loss of each window, (windows,).
        accuracies: Accuracy of each lm-eval task in [0, 1] under the mask, whatever the text;
            empty if none was asked for.
        provenance: ``{"depends_on": hashes and settings, "git": commit}``.
    """

    study: str
    repair: str
    request: dict[str, int]
    budget_fraction: float
    budget_bytes: int
    peak_bytes: int
    text: str
    fitted_on: list[str]
    fit_tokens: int
    mean_rank: float
    mask: list[str]
    mask_from: str
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]
    accuracies: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    record_name = "A repair record"
    rerun = "make it again"

    @property
    def cell(self) -> tuple[int, int, float]:
        """Batch size, sequence length and budget fraction."""
        shape = self.request["batch_size"], self.request["seq_len_tokens"]
        return (*shape, self.budget_fraction)

    @property
    def held_out_domain(self) -> bool:
        """Whether stubs were fitted on no text of this kind."""
        return self.text not in self.fitted_on

    @property
    def key(self) -> str:
        """What makes two rows the same result."""
        return row_key(self.study, self.repair, self.cell, self.text, self.provenance)


def row_key(
    study: str,
    repair: str,
    cell: tuple[int, int, float],
    text: str,
    provenance: Mapping[str, Any],
) -> str:
    """As `RepairRow.key`, known before the row is measured."""
    return digest([study, repair, *cell, text, provenance.get("depends_on", {})])

"""Records of ``experiments.repair``: rows of ``repair.jsonl``, and GSI orders with stubs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.records import CellRecord, read_json
from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from rap_env.importance.profiles import GSIProfile

STUDIES = ("grid", "tokens", "domain", "alone")
ORDERS_FILE = "orders.json"


@dataclass(frozen=True)
class RepairRow(CellRecord):
    """One repair, request, budget and report text: a line of ``repair.jsonl``.

    For the other fields see `CellRecord`; masks are repaired with the stubs.

    Attributes:
        study: ``"grid"``: every repair with its own search; ``"tokens"`` and ``"domain"``:
            libraries fitted on other amounts and kinds of text, under the masks of the grid's
            library; ``"alone"``: a library fitted on one kind of text, with its own search.
        repair: ``"none"``, ``"library"``, ``"distilled"`` or ``"per_mask"``.
        text: Name of the report text.
        fitted_on: Names of the texts that stubs were fitted on; empty without stubs.
        fit_tokens: Number of tokens of those texts.
        mean_rank: Mean rank of the stubs.
        mask_from: The repair whose greedy search chose the mask.
        accuracies: Accuracy of each lm-eval task in [0, 1] under the mask; the same for all texts,
            empty without tasks.
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

    record_name = "A repair record"
    rerun = "make it again"
    identity = ("study", "repair", "cell", "text")


def write_orders(path: Path, profiles: Mapping[str, GSIProfile]) -> None:
    """Write GSI orders by repair: block names, and the ΔNLL after each removal."""
    record = {
        name: {
            "method": profile.method,
            "order": list(profile.order),
            "loss_after": [nll - profile.dense_nll for nll in profile.nll_after],
            "calibration_sha256": profile.provenance["text"]["sha256"],
            "stubs": profile.provenance["scoring"].get("repair", ""),
        }
        for name, profile in profiles.items()
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")


def read_orders(path: Path) -> dict[str, Any]:
    """Read what `write_orders` wrote; empty if there is no file."""
    return read_json(path, made_by="experiments.repair") or {}

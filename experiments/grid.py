"""The evaluation's grid, and what a policy chooses on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from experiments.config import EvaluateConfig
from experiments.tables import mebibytes, percent
from rap_env.memory import MemoryModel
from rap_env.workload import Request

if TYPE_CHECKING:
    from agents.baselines import MaskChoice
    from rap_env.workbench import Workbench

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the dense peak."""


class Selector(Protocol):
    """A trained policy or a baseline."""

    def select(self, request: Request) -> MaskChoice:
        """Choose the blocks to remove for a request."""


@dataclass(frozen=True)
class Choice:
    """What one method chose at one cell.

    Attributes:
        cell: Batch size, sequence length in tokens, budget fraction.
        mask: Names of the removed blocks.
        budget_bytes: The budget.
        peak_bytes: Peak bytes of the mask.
        loss_calibration: Loss on the calibration text, nats per token.
    """

    cell: Cell
    mask: list[str]
    budget_bytes: int
    peak_bytes: int
    loss_calibration: float


def grid_requests(grid: EvaluateConfig, memory: MemoryModel) -> list[tuple[Cell, Request]]:
    """Every cell of the grid with its request.

    Raises:
        InvalidRequestError: A batch or length does not suit the model.
        InfeasibleBudgetError: A budget is below what any mask can reach.
    """
    found = []
    for batch_size, seq_len_tokens in grid.shapes:
        for fraction in sorted(set(grid.budgets), reverse=True):
            request = Request.at_fraction(memory, batch_size, seq_len_tokens, fraction)
            memory.check_feasible(request)
            found.append(((batch_size, seq_len_tokens, fraction), request))
    return found


def choices(
    policy: Selector, requests: Sequence[tuple[Cell, Request]], workbench: Workbench
) -> list[Choice]:
    """What a policy chooses on the grid, with its loss on the calibration text."""
    found = []
    for cell, request in requests:
        mask = policy.select(request).mask
        found.append(
            Choice(
                cell,
                list(mask.names),
                request.budget_bytes,
                workbench.memory.peak_bytes(mask, request),
                workbench.scorer.nll(mask) - workbench.scorer.dense_nll,
            )
        )
    return found


def choice_table(found: Sequence[Choice]) -> tuple[list[str], list[list[str | float]]]:
    """Choices as a table for a logger."""
    header = ["request", "budget", "budget_mib", "peak_mib", "attn_removed", "ffn_removed",
              "loss_calibration"]  # fmt: skip
    rows: list[list[str | float]] = [
        [
            f"{c.cell[0]}x{c.cell[1]}", percent(c.cell[2], 0), mebibytes(c.budget_bytes),
            mebibytes(c.peak_bytes), sum(name.endswith(".attn") for name in c.mask),
            sum(name.endswith(".ffn") for name in c.mask), round(c.loss_calibration, 4),
        ]
        for c in found
    ]  # fmt: skip
    return header, rows

"""The cells of an evaluation, and what a policy chooses on its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.comparison.tables import mebibytes, percent
from experiments.config import EvaluateConfig
from rap_env.memory import MemoryModel
from rap_env.policy import MaskPolicy
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the dense peak."""


@dataclass(frozen=True)
class Asked:
    """One question of an evaluation: a request at a budget.

    Attributes:
        cell: Batch size, sequence length in tokens, budget fraction.
        request: The request, with its budget in bytes.
        sparsity: Share of the block weights that the budget asks to be freed, if given so.
        outside: Whether the cell lies outside the range that policies were trained on.
    """

    cell: Cell
    request: Request
    sparsity: float | None = None
    outside: bool = False

    @property
    def part(self) -> str:
        """Which part of the evaluation it belongs to, as in `ResultRow`."""
        return "outside" if self.outside else "grid" if self.sparsity is None else "sparsity"


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


def all_asked(grid: EvaluateConfig, memory: MemoryModel) -> list[Asked]:
    """Every cell of an evaluation: the grid, fixed sparsities, cells outside the training range.

    Raises:
        InvalidRequestError: A batch or length does not suit the model.
        InfeasibleBudgetError: A budget is below what any mask can reach.
    """
    found = [Asked(cell, request) for cell, request in grid_requests(grid, memory)]
    shape = min(grid.shapes, key=lambda shape: (shape[0] * shape[1], shape))
    found += [_at_sparsity(memory, shape, share) for share in sorted(set(grid.sparsities))]
    for cell in dict.fromkeys(grid.outside_cells):
        request = Request.at_fraction(memory, *cell)
        memory.check_feasible(request)
        found.append(Asked(cell, request, outside=True))
    return found


def _at_sparsity(memory: MemoryModel, shape: tuple[int, int], share: float) -> Asked:
    """A budget below the dense peak by a share of all blocks' bytes.

    At a short request nearly all that a mask can free is weights, so to meet this budget is to
    remove that share of the model's parameters, embeddings and head aside.
    """
    dense = memory.dense_peak_bytes(*shape)
    budget = dense - math.ceil(share * sum(memory.facts.block_param_bytes))
    request = Request(*shape, budget_bytes=max(1, budget))
    memory.check_feasible(request)
    return Asked((*shape, budget / dense), request, sparsity=share)


def choices(
    policy: MaskPolicy, requests: Sequence[tuple[Cell, Request]], context: PruningContext
) -> list[Choice]:
    """What a policy chooses on the grid, with its loss on the calibration text."""
    found = []
    for cell, request in requests:
        mask = policy.choose(request)
        found.append(
            Choice(
                cell,
                list(mask.names),
                request.budget_bytes,
                context.memory.peak_bytes(mask, request),
                context.scorer.nll(mask) - context.scorer.dense_nll,
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

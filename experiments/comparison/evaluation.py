"""Cells and methods of an evaluation, and the masks that a policy chooses on its grid."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.baselines import BASELINES, make_baseline
from agents.baselines.base import CountingPolicy
from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.formatting import mebibytes, percent
from experiments.comparison.run_folder import TABLE_FILE, TrainingRun, training_dirs
from experiments.comparison.summaries import REFERENCE
from experiments.config import Config
from experiments.config.common import Cell
from experiments.config.evaluation import EvaluateConfig
from experiments.errors import ExperimentError
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.errors import check_name
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.scoring.score_table import ScoreTable, TableScorer


@dataclass(frozen=True)
class EvaluationCell:
    """A request at a budget, at which all methods are compared.

    Attributes:
        sparsity: Share of the block bytes to free, if the cell is defined by it.
        outside: Whether the cell is outside the training range of policies.
    """

    cell: Cell
    request: Request
    sparsity: float | None = None
    outside: bool = False

    @property
    def part(self) -> str:
        """Part of the evaluation that the cell belongs to, as in `ResultRow`."""
        return "outside" if self.outside else "grid" if self.sparsity is None else "sparsity"


@dataclass(frozen=True)
class Choice:
    """Mask that a policy chose at one cell.

    Attributes:
        mask: Names of the removed blocks.
        loss_calibration: ΔNLL on the calibration text, nats per token.
    """

    cell: Cell
    mask: list[str]
    budget_bytes: int
    peak_bytes: int
    loss_calibration: float


def grid_requests(grid: EvaluateConfig, memory: MemoryModel) -> list[tuple[Cell, Request]]:
    """Return every cell of the grid with its request."""
    found = []
    for batch_size, seq_len_tokens in grid.shapes:
        for fraction in sorted(set(grid.budgets), reverse=True):
            request = Request.at_fraction(memory, batch_size, seq_len_tokens, fraction)
            memory.check_feasible(request)
            found.append(((batch_size, seq_len_tokens, fraction), request))
    return found


def evaluation_cells(grid: EvaluateConfig, memory: MemoryModel) -> list[EvaluationCell]:
    """Return all cells: the grid, fixed sparsities, and cells outside the training range."""
    found = [EvaluationCell(cell, request) for cell, request in grid_requests(grid, memory)]
    shape = min(grid.shapes, key=lambda shape: (shape[0] * shape[1], shape))
    found += [_at_sparsity(memory, shape, share) for share in sorted(set(grid.sparsities))]
    for cell in dict.fromkeys(grid.outside_cells):
        request = Request.at_fraction(memory, *cell)
        memory.check_feasible(request)
        found.append(EvaluationCell(cell, request, outside=True))
    return found


def _at_sparsity(memory: MemoryModel, shape: tuple[int, int], share: float) -> EvaluationCell:
    """Return a cell whose budget is below the dense peak by a share of all block bytes.

    At a short request, nearly all bytes that a mask frees are weights, so a mask that meets the
    budget removes this share of the parameters, embeddings and head not counted.
    """
    dense = memory.dense_peak_bytes(*shape)
    budget = dense - math.ceil(share * sum(memory.facts.block_param_bytes))
    request = Request(*shape, budget_bytes=max(1, budget))
    memory.check_feasible(request)
    return EvaluationCell((*shape, budget / dense), request, sparsity=share)


def choices(
    policy: CountingPolicy, requests: Sequence[tuple[Cell, Request]], context: PruningContext
) -> list[Choice]:
    """Let a policy choose masks on the grid, and score them on the calibration text."""
    found = []
    for cell, request in requests:
        mask = policy.choose(request)
        peak_bytes = context.memory.peak_bytes(mask, request)
        delta_nll = context.scorer.nll(mask) - context.scorer.dense_nll
        found.append(Choice(cell, list(mask.names), request.budget_bytes, peak_bytes, delta_nll))
    return found


def choice_table(found: Sequence[Choice]) -> tuple[list[str], list[list[str | float]]]:
    """Return choices as header and rows for a logger."""
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


Scores = Callable[[Sequence[BlockMask]], Sequence[float]]


@dataclass(frozen=True)
class Method:
    """One method with one seed.

    Attributes:
        seed: Seed of the agent or the random baseline; None for deterministic methods.
        kv_aware: Whether the method counts the KV cache when it chooses.
        setup_evaluations: Masks scored once, before any request.
        identity: What the masks depend on besides the context, as plain values.
        training_s: Seconds of training; None if not recorded.
    """

    name: str
    seed: int | None
    kv_aware: bool
    setup_evaluations: int
    policy: CountingPolicy
    identity: dict[str, Any]
    training_s: float | None = None


def check_names(config: Config) -> None:
    """Check the names of baselines and run folders before anything is measured.

    Raises:
        UnknownNameError: There is no such baseline.
        ExperimentError: A folder holds no training run, or there is nothing to compare.
    """
    for name in config.evaluate.baselines:
        check_name("baseline", name, BASELINES)
    folders = agent_folders(config)
    for folder in folders:
        _ = TrainingRun(folder).facts  # raises an error if it is no training run
    if not folders and not config.evaluate.baselines:
        raise ExperimentError(
            "There is nothing to evaluate: no finished training in "
            f"{config.stage_dir('train')}, and evaluate.baselines is empty."
        )


def agent_folders(config: Config) -> list[Path]:
    """Return the run folders of the agents to evaluate: the configured or all finished ones."""
    if config.evaluate.agents is not None:
        return [Path(folder) for folder in config.evaluate.agents]
    return training_dirs(config.root, finished=True)


def build_methods(config: Config, context: PruningContext) -> Iterator[Method]:
    """Yield the dense reference, the trained agents, then the baselines."""
    yield _baseline(REFERENCE, None, context)
    for folder in agent_folders(config):
        for best_of in dict.fromkeys(config.evaluate.best_of):
            default = best_of == config.evaluate.best_of[0]
            yield _agent(folder, context, config.importance.method, best_of, default)
    for name in config.evaluate.baselines:
        if name == REFERENCE:
            continue
        seeds: list[int | None] = [*config.evaluate.random_seeds] if name == "random" else [None]
        for seed in seeds:
            yield _baseline(name, seed, context)


def _baseline(name: str, seed: int | None, context: PruningContext) -> Method:
    baseline = make_baseline(name, context, seed or 0)
    return Method(
        name, seed, baseline.kv_aware, baseline.setup_evaluations, baseline, {"baseline": name}
    )


def decision_scores(folder: Path) -> Scores | None:
    """Return the predictor by which an agent selects the best of its sampled masks.

    Returns:
        The run's own score model (`TABLE_FILE` in its folder), which predicts NLL; None if the
        run has none, so that the sampled masks are measured.
    """
    path = folder / TABLE_FILE
    return TableScorer(ScoreTable.load(path)).nll_many if path.exists() else None


def _agent(
    folder: Path, context: PruningContext, importance: str, best_of: int, default: bool
) -> Method:
    """Load a trained agent; its name states `best_of` unless that is the default."""
    run = TrainingRun(folder)
    method = run.method
    identity: dict[str, Any] = {"run": folder.name}
    scores = decision_scores(folder) if best_of > 1 else None
    if not default:
        method = f"{method}-best_of={best_of}"
    if best_of > 1:
        identity |= {"best_of": best_of, "scores": _file_hash(folder / TABLE_FILE) or "real"}
    policy = TrainedPolicy.load(
        folder, context, best_of=best_of, score_masks=scores, scorer=context.scorer
    )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None  # the policy was loaded from it
    identity |= {"step": checkpoint.step, "files": checkpoint.body["files"]}
    blocks = context.memory.facts.num_blocks
    features = {"gsi": lambda: context.gsi.evaluations, "one_shot": lambda: blocks + 1}
    setup = int(run.facts.get("evaluations", 0)) + features.get(importance, lambda: 0)()
    return Method(
        method, run.seed, policy.kv_aware, setup, policy, identity, run.facts.get("training_s")
    )


def _file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hex; empty if the file does not exist."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

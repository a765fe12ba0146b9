"""Cells and methods of an evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.summaries import REFERENCE
from experiments.comparison.training_runs import TABLE_FILE, TrainingRun, training_dirs
from experiments.config import Config
from experiments.config.common import parse_cell
from experiments.config.program_settings import EvaluateConfig
from experiments.contexts import make_ladder_bytes
from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import Cell
from rap_env.context.base import PruningContext, method_order
from rap_env.context.table import TableContext
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import check_policy, make_method
from rap_env.request import Request
from rap_env.scoring.score_table import ScoreTable


@dataclass(frozen=True)
class EvaluationCell:
    """A request at a budget, at which all methods are compared.

    Attributes:
        sparsity: Share of the block bytes to free, if the cell is defined by it.
        outside: Whether the cell is outside the training range of policies.
        target_delta_nll: ΔNLL that the budget stands for, nats per token, if it stands for one.
    """

    cell: Cell
    request: Request
    sparsity: float | None = None
    outside: bool = False
    target_delta_nll: float | None = None

    @property
    def part(self) -> str:
        """Part of the evaluation that the cell belongs to, as in `ResultRow`."""
        return "outside" if self.outside else "grid" if self.sparsity is None else "sparsity"


def grid_requests(grid: EvaluateConfig, ladder_bytes: LadderBytes) -> list[tuple[Cell, Request]]:
    """Return every cell of the grid, and every pinned one, with its request.

    Args:
        grid: Requests and budgets.
        ladder_bytes: The ladder, which decides which budgets can be met.
    """
    cells = _checked(_grid_cells(grid, ladder_bytes.memory), ladder_bytes)
    return [(cell.cell, cell.request) for cell in cells]


def evaluation_cells(grid: EvaluateConfig, ladder_bytes: LadderBytes) -> list[EvaluationCell]:
    """Return all cells: the grid, fixed sparsities, and cells outside the training range."""
    memory = ladder_bytes.memory
    cells = _grid_cells(grid, memory)
    for share in sorted(set(grid.sparsities)):
        shapes = grid.shapes or [pinned.shape for pinned in grid.pinned_cells]
        shape = min(shapes, key=lambda shape: (shape[0] * shape[1], shape))
        cells.append(_at_sparsity(memory, shape, share))
    for outside_cell in dict.fromkeys(map(parse_cell, grid.outside)):
        request = Request.at_fraction(memory, *outside_cell)
        cells.append(EvaluationCell(outside_cell, request, outside=True))
    return _checked(cells, ladder_bytes)


def _grid_cells(grid: EvaluateConfig, memory: MemoryModel) -> list[EvaluationCell]:
    """Return the grid of requests and budgets, then the pinned cells."""
    cells = []
    for shape in grid.shapes:
        for fraction in sorted(set(grid.budgets), reverse=True):
            request = Request.at_fraction(memory, *shape, fraction)
            cells.append(EvaluationCell((*shape, fraction), request))
    for pinned in grid.pinned_cells:
        request = Request(*pinned.shape, budget_bytes=pinned.budget_bytes)
        place = (*pinned.shape, pinned.budget_bytes / memory.dense_peak_bytes(*pinned.shape))
        target = pinned.target_delta_nll
        cells.append(EvaluationCell(place, request, target_delta_nll=target))
    return cells


def _checked(cells: list[EvaluationCell], ladder_bytes: LadderBytes) -> list[EvaluationCell]:
    """Return the cells if some plan fits each of them."""
    for cell in cells:
        ladder_bytes.check_feasible(cell.request)
    return cells


def _at_sparsity(memory: MemoryModel, shape: tuple[int, int], share: float) -> EvaluationCell:
    """Return a cell whose budget is below the native peak by a share of all block bytes.

    At a short request, nearly all bytes that a plan frees are weights, so a plan that meets the
    budget removes this share of the parameters, embeddings and head not counted.
    """
    native = memory.dense_peak_bytes(*shape)
    budget = native - math.ceil(share * sum(memory.facts.block_param_bytes))
    request = Request(*shape, budget_bytes=max(1, budget))
    return EvaluationCell((*shape, budget / native), request, sparsity=share)


Scores = Callable[[Sequence[Plan]], Sequence[float]]


@dataclass(frozen=True)
class ComparedMethod:
    """One method with one seed.

    Attributes:
        seed: Seed of the agent or the random baseline; None for deterministic methods.
        kv_aware: Whether the method counts the KV cache when it chooses.
        setup_evaluations: Plans scored once, before any request.
        identity: What the choices depend on besides the context, as plain values.
        training_s: Seconds of training; None if not recorded.
    """

    name: str
    seed: int | None
    kv_aware: bool
    setup_evaluations: int
    policy: Policy
    identity: dict[str, Any]
    training_s: float | None = None


def check_names(config: Config) -> None:
    """Check the names of baselines and run folders before anything is measured.

    Raises:
        UnknownNameError: There is no such baseline.
        PluginError: A baseline of another package cannot be loaded.
        ExperimentError: A folder holds no training run, or there is nothing to compare.
    """
    if config.evaluate.plans:
        return
    for name in config.evaluate.baselines:
        check_policy(name)
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


def build_methods(config: Config, context: PruningContext) -> Iterator[ComparedMethod]:
    """Yield the native model, the trained agents, then the baselines."""
    ladder_bytes = make_ladder_bytes(config, context)
    yield _baseline(REFERENCE, None, context, ladder_bytes)
    for folder in agent_folders(config):
        for best_of in dict.fromkeys(config.evaluate.best_of):
            default = best_of == config.evaluate.best_of[0]
            yield _agent(config, folder, context, best_of, default)
    for name in config.evaluate.baselines:
        if name == REFERENCE:
            continue
        seeds: list[int | None] = [*config.evaluate.random_seeds] if name == "random" else [None]
        for seed in seeds:
            yield _baseline(name, seed, context, ladder_bytes)


def _baseline(
    name: str, seed: int | None, context: PruningContext, ladder_bytes: LadderBytes
) -> ComparedMethod:
    baseline = make_method(name, context, ladder_bytes, seed or 0)
    identity = {"baseline": name}
    if baseline.table_sha256 is not None:
        identity["table"] = baseline.table_sha256
    if baseline.source_sha256 is not None:
        identity["source"] = baseline.source_sha256
    return ComparedMethod(
        name, seed, baseline.kv_aware, baseline.setup_evaluations, baseline, identity
    )


def decision_scores(folder: Path) -> Scores | None:
    """Return the predictor by which an agent selects the best of its sampled plans.

    Returns:
        The score table that the run was trained on (`TABLE_FILE` in its folder), which predicts
        NLL; None if it was trained on a model, so that the samples are measured.
    """
    path = folder / TABLE_FILE
    if not path.exists():
        return None
    table = TableContext(ScoreTable.load(path), path.name, importance="one_shot")
    return table.scorer.nll_many


def _agent(
    config: Config, folder: Path, context: PruningContext, best_of: int, default: bool
) -> ComparedMethod:
    """Load a trained agent; its name states `best_of` unless that is the default."""
    run = TrainingRun(folder)
    method = run.method
    identity: dict[str, Any] = {"run": folder.name}
    scores = decision_scores(folder) if best_of > 1 else None
    if not default:
        method = f"{method}-best_of={best_of}"
    if best_of > 1:
        table = folder / TABLE_FILE
        digest = hashlib.sha256(table.read_bytes()).hexdigest() if scores else "real"
        identity |= {"best_of": best_of, "scores": digest}
    policy = TrainedPolicy.load(
        folder, context, best_of=best_of, score_plans=scores, scorer=context.scorer
    )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None  # the policy was loaded from it
    identity |= {"step": checkpoint.step, "files": checkpoint.body["files"]}
    setup = int(run.facts.get("evaluations", 0)) + _importance_evaluations(config, context)
    return ComparedMethod(
        method, run.seed, policy.kv_aware, setup, policy, identity, run.facts.get("training_s")
    )


def _importance_evaluations(config: Config, context: PruningContext) -> int:
    """Return how many evaluations the importance needed that agents observe."""
    method = config.importance.method
    if method == "none":
        return 0
    return method_order(context, make_ladder_bytes(config, context), method)[1]

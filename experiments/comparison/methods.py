"""Who is compared: trained policies and baselines, behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.baselines import BASELINES, make_baseline
from agents.baselines.base import CountingPolicy
from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.report_data import method_and_seed, training_dirs
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.errors import ExperimentError
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.errors import UnknownNameError
from rap_env.scoring.score_table import ScoreTable, TableScorer

REFERENCE = "dense"

TABLE_FILE = "score_table.json"
"""The score model that a run trained on, in its folder."""

Scores = Callable[[Sequence[BlockMask]], Sequence[float]]


@dataclass(frozen=True)
class Contestant:
    """One method with one seed.

    Attributes:
        method: Its name.
        seed: Seed of the agent or the random baseline, None where nothing is drawn.
        kv_aware: Whether it counts the KV cache when it decides.
        setup_evaluations: Masks scored once, before any request.
        policy: The policy that chooses masks.
        identity: What its choices depend on beside the context, as plain values.
        training_s: Seconds that it was trained for; None where none were noted.
    """

    method: str
    seed: int | None
    kv_aware: bool
    setup_evaluations: int
    policy: CountingPolicy
    identity: dict[str, Any]
    training_s: float | None = None


def check_names(config: Config) -> None:
    """Refuse unknown baselines and folders before anything is measured.

    Raises:
        UnknownNameError: There is no such baseline.
        ExperimentError: A folder holds no training run, or there is nothing to compare.
    """
    for name in config.evaluate.baselines:
        if name not in BASELINES:
            raise UnknownNameError("baseline", name, BASELINES)
    folders = agent_folders(config)
    for folder in folders:
        method_and_seed(folder)
    if not folders and not config.evaluate.baselines:
        raise ExperimentError(
            "There is nothing to evaluate: no finished training in "
            f"{config.stage_dir('train')}, and evaluate.baselines is empty."
        )


def agent_folders(config: Config) -> list[Path]:
    """Folders of the agents to evaluate: those asked for, or all finished ones."""
    if config.evaluate.agents is not None:
        return [Path(folder) for folder in config.evaluate.agents]
    return training_dirs(config.root, finished=True)


def contestants(config: Config, context: PruningContext) -> Iterator[Contestant]:
    """The dense reference, the trained agents, then the baselines.

    Raises:
        ArtifactError: A run has no whole checkpoint, or one of another model.
    """
    yield _baseline(REFERENCE, None, context)
    for folder in agent_folders(config):
        for best_of in dict.fromkeys(config.evaluate.best_of):
            usual = best_of == config.evaluate.best_of[0]
            yield _agent(folder, context, config.importance.method, best_of, usual)
    for name in config.evaluate.baselines:
        if name == REFERENCE:
            continue
        seeds: list[int | None] = [*config.evaluate.random_seeds] if name == "random" else [None]
        for seed in seeds:
            yield _baseline(name, seed, context)


def _baseline(name: str, seed: int | None, context: PruningContext) -> Contestant:
    baseline = make_baseline(name, context, seed or 0)
    return Contestant(
        name, seed, baseline.kv_aware, baseline.setup_evaluations, baseline, {"baseline": name}
    )


def decision_scores(folder: Path) -> Scores | None:
    """Predicted scores that an agent picks the best of its proposals by, less is better.

    Returns:
        Those of the run's own score model (`TABLE_FILE` in its folder); None where it has none,
        so that proposals are really scored.

    Raises:
        ArtifactError: The score model is damaged.
    """
    path = folder / TABLE_FILE
    return TableScorer(ScoreTable.load(path)).nll_many if path.exists() else None


def _agent(
    folder: Path, context: PruningContext, importance: str, best_of: int, usual: bool
) -> Contestant:
    """A trained agent; where it decides in another way than is usual, its name says so."""
    method, seed = method_and_seed(folder)
    identity: dict[str, Any] = {"run": folder.name}
    scores = decision_scores(folder) if best_of > 1 else None
    if not usual:
        method = f"{method}-best_of={best_of}"
    if best_of > 1:
        identity |= {"best_of": best_of, "scores": _file_hash(folder / TABLE_FILE) or "real"}
    policy = TrainedPolicy.load(
        folder, context, best_of=best_of, score_masks=scores, scorer=context.scorer
    )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None  # the policy was loaded from it
    identity |= {"step": checkpoint.step, "files": checkpoint.body["files"]}
    facts = RunFolder(folder).read() or {}
    blocks = context.memory.facts.num_blocks
    features = {"gsi": lambda: context.gsi.evaluations, "one_shot": lambda: blocks + 1}
    setup = int(facts.get("evaluations", 0)) + features.get(importance, lambda: 0)()
    trained = facts.get("training_s")
    return Contestant(method, seed, policy.kv_aware, setup, policy, identity, trained)


def _file_hash(path: Path) -> str:
    """SHA-256 in hex; empty without a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

"""``python -m experiments.train``: train one agent, or a sweep of agents with ``-m``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

import rap_env
from agents.algorithms import AgentConfig
from agents.checkpoint import latest_checkpoint
from agents.export import export_policy
from agents.trained_policy import TrainedPolicy
from agents.training import TrainResult
from experiments.config import Config
from experiments.contexts import (
    EvaluationCell,
    build_context,
    evaluation_cells,
    held_out_text,
    make_ladder_bytes,
)
from experiments.launch import launch, swept_settings
from experiments.score_model import learn
from experiments.study.console import say
from experiments.study.json_records import trim_metrics
from experiments.study.loggers import open_loggers
from experiments.study.run_folder import RunFolder
from rap_env.context.base import PruningContext
from rap_env.leaderboard.tasks import pinned_tasks
from rap_env.memory import MemoryModel
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.reward import plan_scores
from rap_env.scoring.score_table import TableScorer
from rap_env.scoring.scorer import PlanScorer

log = logging.getLogger(__name__)

FROZEN = (
    "model", "calibration", "importance", "workload", "reward", "env", "agent",
    "seed", "warm_start", "score_model", "frontier",
    "evaluate.requests", "evaluate.budgets", "evaluate.pinned", "evaluate.selection",
)  # fmt: skip
"""Settings that must not change when a run resumes."""


def train(config: Config, folder: Path, *, swept: dict[str, Any] | None = None) -> Path:
    """Train an agent, or resume its training, and measure the plans that its policy chooses.

    Args:
        config: All settings.
        folder: The run's folder; its name is the run's label.
        swept: The settings that vary in a sweep, with this run's values, for ``run.json``.

    Returns:
        The folder.
    """
    run = RunFolder(folder)
    started = time.monotonic()
    agent = agent_config(config)
    method = folder.name.removesuffix(f"-s{config.seed}")  # which all its seeds share
    facts: dict[str, Any] = {"method": method, "seed": config.seed}
    if swept:  # a run that resumes outside its sweep keeps what is recorded
        facts["swept"] = swept
    record = run.start(config, frozen=FROZEN, **facts)
    if "finished" in record and record.get("timesteps", 0) >= agent.total_timesteps:
        log.info("Training: %s is finished (%d steps).", folder.name, record["timesteps"])
        return folder
    context = build_context(config)
    ladder_bytes = make_ladder_bytes(config, context)
    cells = evaluation_cells(config.evaluate, ladder_bytes)  # fails now, not later
    scorer: PlanScorer | TableScorer = context.scorer
    selection = config.evaluate.selection_text
    if selection is not None:
        text = held_out_text(selection, "selection", context)
        scorer = PlanScorer(context.llm, text, context.store)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    trim_metrics(run.metrics, checkpoint.step if checkpoint else 0)
    with open_loggers(config, folder, job="train") as loggers:
        facts = facts_of(learn(config, agent, context, folder, loggers.log))
        policy = TrainedPolicy.load(folder, context)
        facts["objective"] = objective(policy, cells, scorer, context.memory)
        loggers.log({"objective": facts["objective"]}, facts["timesteps"])
    run.finish(started, **facts)
    log.info("Training: %s is finished (%d steps).", folder.name, facts["timesteps"])
    return folder


def agent_config(config: Config) -> AgentConfig:
    """Convert the settings of the agent to those of the trainer."""
    settings = {name: value for name, value in vars(config.agent).items() if name != "label"}
    for section in ("policy_settings", "hyperparameters"):
        given = settings[section].items()
        settings[section] = {name: value for name, value in given if value is not None}
    return AgentConfig(**settings, seed=config.seed)


def facts_of(result: TrainResult) -> dict[str, Any]:
    """Return the entries of ``run.json`` about a finished training."""
    recent = result.recent_delta_nll
    return {
        "timesteps": result.timesteps,
        "episodes": result.episodes,
        "evaluations": result.evaluations,
        "training_s": round(result.seconds, 2),
        "recent_delta_nll": recent if math.isfinite(recent) else None,
    }


def objective(
    policy: TrainedPolicy,
    cells: Sequence[EvaluationCell],
    scorer: PlanScorer | TableScorer,
    memory: MemoryModel,
) -> float:
    """Return what a policy's plans count as on a text, mean in nats per token.

    They count as on the leaderboard (`plan_scores`), so that one poor plan hides no other.
    """
    plans = [policy.choose(cell.request) for cell in cells]
    delta_nll = [scorer.nll(plan) - scorer.native_nll for plan in plans]
    fits = [
        memory.peak_bytes(plan, cell.request) <= cell.request.budget_bytes
        for plan, cell in zip(plans, cells, strict=True)
    ]
    return float(plan_scores(delta_nll, fits, memory.facts.vocab_size).mean())


def task_of(config: Config) -> str | None:
    """Return the newest pinned task on the score table that a training runs on, if it has one."""
    own = config.env.id, config.model.name
    tasks = (task for task in pinned_tasks().values() if not task.live)
    names = [task.name for task in tasks if (task.environment, task.arguments["model"]) == own]
    return max(names, default=None)


def verdict(config: Config, folder: Path, context: PruningContext) -> str:
    """Return a policy's ΔNLL beside the published methods; "" if no pinned task has its table.

    Args:
        config: The settings of the training.
        folder: Its run folder.
        context: The score table that it ran on.
    """
    task = task_of(config)
    if task is None:
        return ""
    policy = NetworkPolicy(context.memory, export_policy(folder, context))  # decides faster
    result = rap_env.evaluate(policy, task, "test", name=folder.name, seed=config.seed)
    return f"{result}\nAll plans of the published methods were measured on the model.\n"


def run_trial(config: Config, folder: Path) -> float:
    """Train an agent and return the objective that a sweep minimises."""
    train(config, folder, swept=swept_settings())
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN:
        say(f"{verdict(config, folder, build_context(config))}The run is in {folder}.")
    record = RunFolder(folder).read()
    assert record is not None
    return float(record["objective"])


if __name__ == "__main__":
    launch("train", run_trial)

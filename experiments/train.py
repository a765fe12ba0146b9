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

from agents.algorithms import AgentConfig
from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from agents.training import TrainResult
from experiments.comparison.evaluation import grid_requests
from experiments.comparison.figures import LevelsLine, levels_picture
from experiments.config import Config
from experiments.contexts import build_context, ladder_bytes
from experiments.launch import launch, swept_settings
from experiments.study.console import say
from experiments.study.figures import save_png
from experiments.study.records import Cell, trim_metrics
from experiments.study.run_folder import RunFolder
from experiments.study.tables import percent, shape_words
from experiments.training.loggers import Loggers, open_loggers
from experiments.training.objective import ObjectiveScorer, objective
from experiments.training.score_model import learn
from experiments.training.verdict import next_steps, verdict
from rap_env.context.base import PruningContext
from rap_env.plan import Plan
from rap_env.request import Request

log = logging.getLogger(__name__)

FROZEN = (
    "model", "calibration", "importance", "repair", "workload", "reward", "env", "agent",
    "seed", "warm_start", "score_model", "frontier",
)  # fmt: skip
"""Settings that must not change when a run resumes."""


def train(config: Config, folder: Path, *, swept: dict[str, Any] | None = None) -> Path:
    """Train an agent, or resume its training, and record the masks that its policy chooses.

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
    facts: dict[str, Any] = {"method": method_of(folder.name, config.seed), "seed": config.seed}
    if swept:  # a run that resumes outside its sweep keeps what is recorded
        facts["swept"] = swept
    record = run.start(config, frozen=FROZEN, **facts)
    if "finished" in record and record.get("timesteps", 0) >= agent.total_timesteps:
        log.info("Training: %s is finished (%d steps).", folder.name, record["timesteps"])
        return folder
    context = build_context(config)
    item_bytes = ladder_bytes(config, context)
    requests = grid_requests(config.evaluate, context.memory, item_bytes)  # fails now, not later
    scorer = ObjectiveScorer(config, context)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    step = checkpoint.step if checkpoint else 0
    trim_metrics(run.metrics, step)
    with open_loggers(config, folder, job="train", step=step) as loggers:
        facts = facts_of(learn(config, agent, context, folder, loggers.log))
        facts |= scorer.facts(show_policy(folder, requests, context, loggers))
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


def method_of(label: str, seed: int) -> str:
    """Return a run's label without its seed, which all seeds of a method share."""
    return label.removesuffix(f"-s{seed}")


def show_policy(
    folder: Path,
    requests: Sequence[tuple[Cell, Request]],
    context: PruningContext,
    loggers: Loggers,
) -> list[Plan]:
    """Draw, log and return what the policy chooses on the evaluation's grid."""
    policy = TrainedPolicy.load(folder, context)
    plans = [policy.choose(request) for _, request in requests]
    path = folder / "policy.png"
    lines = [
        LevelsLine(cell[:2], f"{shape_words(cell)}  {percent(cell[2], 0)}", plan.levels)
        for (cell, _), plan in zip(requests, plans, strict=True)
    ]
    save_png(levels_picture(lines, context.memory.facts.num_layers), path)
    loggers.image("policy/levels", path)
    return plans


def run_trial(config: Config, folder: Path) -> float:
    """Train an agent and return the objective that a sweep minimises."""
    train(config, folder, swept=swept_settings())
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN:
        context = build_context(config)
        say(verdict(config, folder, context))
        say(next_steps(config, folder, context, HydraConfig.get().overrides.task))
    return objective(config, folder)


if __name__ == "__main__":
    launch("train", run_trial)

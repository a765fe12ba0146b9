"""``python -m experiments.train``: train one agent; with ``-m``, a sweep of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gymnasium.vector import AutoresetMode

from agents.algorithms import AgentConfig
from agents.checkpoint import latest_checkpoint
from agents.policy import TrainedPolicy
from agents.training import TrainResult
from agents.training import train as train_agent
from experiments.bench import open_bench
from experiments.cli import launch
from experiments.config import Config
from experiments.figures import PNG_DPI, style
from experiments.grid import Cell, choice_table, choices, grid_requests
from experiments.loggers import Loggers, open_loggers
from experiments.policy_figures import removal_picture
from experiments.records import trim_curve
from experiments.runs import RunFolder
from rap_env.artifacts import atomic_write
from rap_env.envs.vector import RAPPruneVectorEnv
from rap_env.workbench import Workbench
from rap_env.workload import Request

log = logging.getLogger(__name__)

FROZEN = (
    "model", "calibration", "importance", "repair", "workload", "reward", "env", "agent", "seed",
)  # fmt: skip
"""Settings that a run cannot change when it goes on."""


def train(config: Config, folder: Path) -> Path:
    """Train an agent, or go on with it, and write down what its policy chooses.

    Args:
        config: All settings.
        folder: The run's folder; its name is the run's label.

    Returns:
        The folder.

    Raises:
        RapError: A setting cannot be, the folder holds another run, or training failed.
    """
    run = RunFolder(folder)
    started = time.monotonic()
    agent = agent_config(config)
    record = run.start(
        config, frozen=FROZEN, method=method_of(folder.name, config.seed), seed=config.seed
    )
    if "finished" in record and record.get("timesteps", 0) >= agent.total_timesteps:
        log.info("Training: %s is done (%d steps).", folder.name, record["timesteps"])
        return folder
    workbench = open_bench(config)
    requests = grid_requests(config.evaluate, workbench.memory)  # refused now, not after hours
    checkpoint = latest_checkpoint(folder / "checkpoints")
    step = checkpoint.step if checkpoint else 0
    trim_curve(run.metrics, step)
    with open_loggers(config, folder, job="train", step=step) as loggers:
        result = train_agent(
            agent,
            lambda num_envs: make_envs(config, workbench, num_envs),
            folder,
            log_fns=[loggers.log],
            progress=config.progress,
        )
        show_policy(folder, requests, workbench, loggers)
    run.finish(started, **facts_of(result))
    log.info("Training: %s is done.", folder.name)
    return folder


def agent_config(config: Config) -> AgentConfig:
    """The agent in the trainer's own terms.

    Raises:
        UnknownNameError: There is no such agent, policy or hyperparameter.
        AgentConfigError: A value is impossible.
    """
    agent = config.agent
    return AgentConfig(
        name=agent.name,
        policy=agent.policy,
        total_timesteps=agent.total_timesteps,
        n_envs=agent.n_envs,
        seed=config.seed,
        hyperparameters={k: v for k, v in agent.hyperparameters.items() if v is not None},
        normalize_reward=agent.normalize_reward,
    )


def make_envs(config: Config, workbench: Workbench, num_envs: int) -> RAPPruneVectorEnv:
    """The environments on a live workbench, stepped and scored together.

    Raises:
        RapError: A setting of workload, reward or environment cannot be.
    """
    return RAPPruneVectorEnv(
        num_envs=num_envs,
        autoreset_mode=AutoresetMode.SAME_STEP,
        workbench=workbench,
        workload=config.workload,
        reward=config.reward,
        tasks=asdict(config.env.tasks) if config.env.tasks.names else None,
        infeasible=config.env.infeasible,
        invalid_action_penalty=config.env.invalid_action_penalty,
        max_invalid_actions=config.env.max_invalid_actions,
    )


def facts_of(result: TrainResult) -> dict[str, object]:
    """What ``run.json`` keeps of a training."""
    return {
        "timesteps": result.timesteps,
        "episodes": result.episodes,
        "evaluations": result.evaluations,
        "training_s": round(result.seconds, 2),
        "recent_loss": result.recent_loss if math.isfinite(result.recent_loss) else None,
    }


def method_of(label: str, seed: int) -> str:
    """A run's label without its seed: what several seeds of one method share."""
    return label.removesuffix(f"-s{seed}")


def show_policy(
    folder: Path,
    requests: Sequence[tuple[Cell, Request]],
    workbench: Workbench,
    loggers: Loggers,
) -> None:
    """Draw and log which blocks the policy removes on the evaluation's grid."""
    found = choices(TrainedPolicy.load(folder, workbench), requests, workbench)
    path = folder / "policy.png"
    figure = removal_picture(found, workbench.memory.facts.num_layers, narrow=False)
    with style(), atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=PNG_DPI)
    loggers.image("policy/blocks_removed", path)
    loggers.table("policy/choices", *choice_table(found))


if __name__ == "__main__":
    launch("train", train)

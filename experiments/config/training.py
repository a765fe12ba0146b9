"""The environment, the agent, and where its metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from experiments.config.parts import TasksConfig, at_least
from rap_env.errors import UnknownNameError

WANDB_MODES = ("auto", "online", "offline")


@dataclass
class EnvConfig:
    """Settings of ``RAPPrune-v0`` that are neither workload nor reward."""

    infeasible: str = "clip"
    invalid_action_penalty: float = 0.1
    max_invalid_actions: int = 10
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; no names leaves the environment's own."""


@dataclass
class AgentConfig:
    """An algorithm and how long it trains."""

    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn`` or ``masked_dqn``."""
    label: str | None = None
    """What its runs are called in folders and tables; null for the agent's name."""
    policy: str = "blockwise"
    """``blockwise`` (one network for all blocks) or ``mlp``."""
    total_timesteps: int = 20_000
    n_envs: int = 8
    """Environments stepped together; they share one model."""
    normalize_reward: bool = True
    policy_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Settings of the algorithm; null stands for the agent's own default."""

    def __post_init__(self) -> None:
        """Refuse lengths below one."""
        at_least("agent", 1, total_timesteps=self.total_timesteps, n_envs=self.n_envs)


@dataclass
class LoggerConfig:
    """Where metrics go beside the run folder's ``metrics.jsonl``, which is always written."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "rap"
    wandb_mode: str = "auto"
    """``auto``: online if a login is found, else offline."""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse unknown modes."""
        if self.wandb_mode not in WANDB_MODES:
            raise UnknownNameError("logger.wandb_mode", self.wandb_mode, WANDB_MODES)


@dataclass
class DemoConfig:
    """What ``experiments.demo`` runs."""

    agents: list[str] = field(default_factory=list)
    """Agents to train, each a file of ``conf/agent``; empty for the configured one."""
    seeds: list[int] = field(default_factory=lambda: [0])

"""The environment, the agent, and where its metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from experiments.config.common import TasksConfig, at_least
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


TEACHERS = ("none", "frontier", "greedy")


@dataclass
class WarmStartConfig:
    """Imitation before reinforcement."""

    teacher: str = "none"
    """``none``; ``frontier``: the table of best known masks; ``greedy``: greedy searches."""
    requests: int = 512
    """Requests drawn from the workload that the teacher answers."""
    updates: int = 600
    """Updates of the network on the teacher's answers."""
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse unknown teachers and counts below one."""
        if self.teacher not in TEACHERS:
            raise UnknownNameError("teacher", self.teacher, TEACHERS)
        at_least("warm_start", 1, requests=self.requests, updates=self.updates)
        at_least("warm_start", 0, learning_rate=self.learning_rate)


@dataclass
class ScoreModelConfig:
    """Training on predicted scores, checked and corrected with real ones in rounds."""

    rounds: int = 0
    """Times that the score model is fitted, the training divided among them; 0 trains on real
    scores alone."""
    first_masks: int = 1000
    """Masks really scored before the first round, where no frontier table has scores already."""
    verify_requests: int = 128
    """Requests whose masks by the policy, the best and a drawn one, are really scored after each
    round."""
    members: int = 5
    """Predictors of the ensemble."""
    doubt: float = 1.0
    """Standard deviations of the ensemble that are added to a predicted loss."""

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        at_least("score_model", 0, rounds=self.rounds, doubt=self.doubt)
        at_least("score_model", 1, first_masks=self.first_masks, members=self.members)
        at_least("score_model", 1, verify_requests=self.verify_requests)


@dataclass
class FrontierConfig:
    """The table of best known masks, which ``experiments.profile`` builds."""

    evaluations: int = 0
    """Masks that are scored at most; 0 builds no table."""
    deepest_loss: float = 3.0
    """Counts of blocks whose best mask is expected to lose more are left out, nats per token."""
    requests: int = 512
    """Requests drawn from the workload: their bytes decide which counts are of use."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        at_least("frontier", 0, evaluations=self.evaluations, deepest_loss=self.deepest_loss)
        at_least("frontier", 1, requests=self.requests)

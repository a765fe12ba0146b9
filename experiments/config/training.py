"""Settings of training: environment, agent, warm start, score model and loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from agents.settings import HYPERPARAMETERS, with_defaults
from experiments.config.common import TasksConfig, at_least, one_of

WANDB_MODES = ("auto", "online", "offline")
TEACHERS = ("none", "frontier", "greedy")


@dataclass
class EnvConfig:
    """Settings of ``RAPPrune-v0`` other than workload and reward."""

    infeasible: str = "clip"
    invalid_action_penalty: float = 0.1
    max_invalid_actions: int = 10
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; without names, the environment's default tasks."""


@dataclass
class AgentConfig:
    """An algorithm and the length of its training."""

    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn`` or ``masked_dqn``."""
    label: str | None = None
    """Name of its runs in folders and tables; null for the agent's name."""
    policy: str = "blockwise"
    """``blockwise`` (one network applied to every block) or ``mlp``."""
    total_timesteps: int = 20_000
    n_envs: int = 8
    """Number of sub-environments; they share one model."""
    normalize_reward: bool = True
    policy_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the algorithm. Here and in `policy_settings` null, or no entry, stands for
    the value in the agent's file in ``conf/agent``, which then replaces it."""

    def __post_init__(self) -> None:
        at_least("agent", 1, total_timesteps=self.total_timesteps, n_envs=self.n_envs)
        completed = complete_agent(vars(self))
        self.policy_settings = completed["policy_settings"]
        self.hyperparameters = completed["hyperparameters"]


def complete_agent(agent: dict[str, Any]) -> dict[str, Any]:
    """Return an agent's section of a config in which no setting is null or missing.

    Runs that were recorded before ``conf/agent`` held the values have nulls in their config.
    """
    if agent["name"] not in HYPERPARAMETERS:
        return agent
    completed = dict(agent)
    for section in ("policy_settings", "hyperparameters"):
        given = {k: value for k, value in agent.get(section, {}).items() if value is not None}
        completed[section] = with_defaults(agent["name"], section, given)
    return completed


@dataclass
class WarmStartConfig:
    """Imitation learning before reinforcement learning."""

    teacher: str = "none"
    """``none``; ``frontier``: the frontier table; ``greedy``: greedy searches."""
    requests: int = 512
    """Number of workload requests that the teacher answers."""
    updates: int = 600
    """Updates of the network on the teacher's masks."""
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        one_of("teacher", self.teacher, TEACHERS)
        at_least("warm_start", 1, requests=self.requests, updates=self.updates)
        at_least("warm_start", 0, learning_rate=self.learning_rate)


@dataclass
class ScoreModelConfig:
    """Training on predicted scores that are corrected with measured ones after each round."""

    rounds: int = 0
    """Number of rounds, each of which fits the score model anew; the training steps are divided
    among them. 0 trains on measured scores only."""
    first_masks: int = 1000
    """Masks measured before the first round, if no frontier table provides scores."""
    verify_requests: int = 128
    """Requests on which masks of the policy are measured after each round: for each request the
    most probable mask, and the best of several sampled ones."""
    members: int = 5
    """Predictors of the ensemble."""
    pessimism: float = 1.0
    """Standard deviations of the ensemble that are added to a predicted ΔNLL."""

    def __post_init__(self) -> None:
        at_least("score_model", 0, rounds=self.rounds, pessimism=self.pessimism)
        at_least("score_model", 1, first_masks=self.first_masks, members=self.members)
        at_least("score_model", 1, verify_requests=self.verify_requests)


@dataclass
class FrontierConfig:
    """The frontier table that ``experiments.profile`` builds."""

    evaluations: int = 0
    """Masks to score at most; 0 builds no table."""
    deepest_loss: float = 3.0
    """Pairs of counts whose best mask is expected to have a larger ΔNLL, in nats per token, are
    left out."""
    requests: int = 512
    """Workload requests that decide which pairs of counts are useful."""

    def __post_init__(self) -> None:
        at_least("frontier", 0, evaluations=self.evaluations, deepest_loss=self.deepest_loss)
        at_least("frontier", 1, requests=self.requests)


@dataclass
class LoggerConfig:
    """Loggers besides ``metrics.jsonl`` in the run folder, which is always written."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "rap"
    wandb_mode: str = "auto"
    """``auto``: online if a login is found, else offline."""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("logger.wandb_mode", self.wandb_mode, WANDB_MODES)


@dataclass
class DemoConfig:
    """Agents that ``experiments.demo`` trains."""

    agents: list[str] = field(default_factory=list)
    """Names of files in ``conf/agent``; empty for the configured agent."""
    seeds: list[int] = field(default_factory=lambda: [0])

"""Settings of training: environment, agent, warm start, score model and loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from agents.settings import with_defaults
from experiments.config.common import Count, CountOrZero, NotNegative, Section, TasksConfig, among
from rap_env.errors import UnknownNameError

ENV_IDS = ("RAPPrune-v0", "RAPLadder-v0")
TEACHERS = ("none", "frontier", "greedy", "knapsack", "gsi", "one_shot", "score_model")


@dataclass
class EnvConfig(Section):
    """Settings of the environment other than workload and reward."""

    section = "env"
    id: Annotated[str, among(*ENV_IDS)] = "RAPPrune-v0"
    """``RAPPrune-v0`` removes blocks; ``RAPLadder-v0`` lowers items by one level."""
    levels: Any = "all"
    """Levels of ``RAPLadder-v0``: a name of `rap_env.ladder.items.LADDERS`, or lists by kind."""
    together: list[str] = field(default_factory=lambda: ["int8", "int4"])
    """Levels of ``RAPLadder-v0`` that all caches take together."""
    infeasible: str = "clip"
    invalid_action_penalty: float = 0.1
    max_invalid_actions: int = 10
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; without names, the environment's default tasks."""

    @property
    def lowers(self) -> bool:
        """Whether an action lowers an item of a ladder by one level, as in ``RAPLadder-v0``."""
        return self.id == "RAPLadder-v0"

    @property
    def ladder(self) -> dict[str, Any]:
        """What defines the ladder of a model, as `rap_env.ladder.items.Ladder.of` takes it."""
        return {"levels": self.levels, "together": self.together}


@dataclass
class AgentConfig(Section):
    """An algorithm and the length of its training."""

    section = "agent"
    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``, or an agent of another package."""
    label: str | None = None
    """Name of its runs in folders and tables; null for the agent's name."""
    policy: str = "blockwise"
    """``blockwise`` (one network applied to every block or item) or ``mlp``."""
    total_timesteps: Count = 20_000
    n_envs: Count = 8
    """Number of sub-environments; they share one model."""
    normalize_reward: bool = True
    policy_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the algorithm. Here and in `policy_settings`, null or a missing entry is
    replaced by the value in the agent's file in ``conf/agent``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        completed = complete_agent(vars(self))
        self.policy_settings = completed["policy_settings"]
        self.hyperparameters = completed["hyperparameters"]


def complete_agent(agent: dict[str, Any]) -> dict[str, Any]:
    """Return an agent's section of a config in which no setting is null or missing.

    Runs that were recorded before ``conf/agent`` held the values have nulls in their config.
    """
    if agent["name"] == MISSING:
        return agent
    completed = dict(agent)
    for section in ("policy_settings", "hyperparameters"):
        given = {k: value for k, value in agent.get(section, {}).items() if value is not None}
        try:
            completed[section] = with_defaults(agent["name"], section, given)
        except UnknownNameError:  # its package is not installed, or the training reports it
            return agent
    return completed


@dataclass
class WarmStartConfig(Section):
    """Imitation learning before reinforcement learning."""

    section = "warm_start"
    teacher: Annotated[str, among(*TEACHERS)] = "none"
    """``frontier``: the table of the best known masks or plans; ``greedy``: greedy searches per
    byte; ``knapsack``, ``gsi``, ``one_shot`` and ``score_model``: the baselines of these names."""
    requests: Count = 512
    """Number of workload requests that the teacher answers."""
    updates: Count = 600
    """Updates of the network on the teacher's masks or plans."""
    learning_rate: NotNegative = 3e-3


@dataclass
class ScoreModelConfig(Section):
    """Training on predicted scores that are corrected with measured ones after each round."""

    section = "score_model"
    rounds: CountOrZero = 0
    """Number of rounds, each of which fits the score model again; the training steps are divided
    among them. 0 trains on measured scores only."""
    first_masks: Count = 1000
    """Masks measured before the first round, if no frontier table provides scores."""
    verify_requests: Count = 128
    """Requests on which masks of the policy are measured after each round: for each request the
    most probable mask, and the best of several sampled ones."""
    members: Count = 5
    """Predictors of the ensemble."""
    pessimism: NotNegative = 1.0
    """Standard deviations of the ensemble that are added to a predicted ΔNLL."""


@dataclass
class FrontierConfig(Section):
    """The frontier table that ``experiments.profile`` builds."""

    section = "frontier"
    evaluations: CountOrZero = 0
    """Masks to score at most; 0 builds no table."""
    deepest_loss: NotNegative = 3.0
    """Pairs of counts whose best mask is expected to have a larger ΔNLL, in nats per token, are
    left out."""
    requests: Count = 512
    """Workload requests that decide which pairs of counts, or which plans, are useful."""
    start: str | None = None
    """A table of plans of the same model without stubs, whose best plans are measured first."""


@dataclass
class LoggerConfig(Section):
    """Loggers besides ``metrics.jsonl`` in the run folder, which is always written."""

    section = "logger"
    wandb: bool = False
    tensorboard: bool = False
    project: str = "rap"
    wandb_mode: Annotated[str, among("auto", "online", "offline")] = "auto"
    """``auto``: online if a login is found, else offline."""
    tags: list[str] = field(default_factory=list)

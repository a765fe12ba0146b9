"""Settings of profiles and trainings: environment, agent, imitation, predicted scores, loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from experiments.config.common import TasksConfig
from rap_env.envs.config import ENVIRONMENTS
from rap_env.envs.config import EnvConfig as TaskConfig
from rap_env.specs import setting

TEACHERS = ("none", "frontier", "greedy", "knapsack", "gsi", "one_shot", "score_model")


@dataclass
class EnvConfig:
    """Settings of the environment other than workload and reward."""

    id: str = setting("RAPPrune-v0", choices=ENVIRONMENTS)
    """``RAPPrune-v0`` removes blocks; ``RAPLadder-v0`` lowers items by one level."""
    levels: Any = "all"
    """Levels of ``RAPLadder-v0``: a name of `rap_env.levels.LADDERS`, or lists by kind."""
    together: list[str] = setting(["int8", "int4"])
    """Levels of ``RAPLadder-v0`` that all caches take together."""
    invalid_action_penalty: float = setting(0.1, low=0)
    """What an invalid action costs."""
    max_invalid_actions: int = setting(10, low=1)
    """Invalid actions after which an episode is truncated."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; without names, the environment's default tasks."""

    @property
    def task(self) -> type[TaskConfig]:
        """What distinguishes the environment: its layout of observations, how its model loads."""
        return ENVIRONMENTS[self.id]

    @property
    def arguments(self) -> dict[str, Any]:
        """What defines the levels, as arguments of the environment."""
        names = [name for name in ("levels", "together") if name not in self.task.unused]
        return {name: getattr(self, name) for name in names}

    @property
    def ladder(self) -> dict[str, Any]:
        """What defines the ladder of a model, as `rap_env.ladder.items.Ladder.of` takes it."""
        return {"levels": self.task.levels, "together": self.task.together, **self.arguments}


@dataclass
class AgentConfig:
    """An algorithm and the length of its training."""

    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``, or an agent of another package."""
    label: str | None = None
    """Name of its runs in folders and tables; null for the agent's name."""
    total_timesteps: int = setting(20_000, low=1)
    """Steps of the environment until the training ends."""
    n_envs: int = setting(8, low=1)
    """Number of sub-environments; they share one model."""
    normalize_reward: bool = True
    """Whether rewards are divided by their running standard deviation."""
    policy_settings: dict[str, Any] = setting({})
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = setting({})
    """Hyperparameters of the algorithm. Here and in `policy_settings`, null or a missing entry is
    replaced by the value in the agent's file in ``conf/agent``."""


@dataclass
class WarmStartConfig:
    """Imitation learning before reinforcement learning."""

    teacher: str = setting("none", choices=TEACHERS)
    """``frontier``: the table of the best known plans; ``greedy``: greedy searches per byte; the
    others: the methods of these names."""
    requests: int = setting(512, low=1)
    """Workload requests that the teacher answers."""
    updates: int = setting(600, low=1)
    """Updates of the network on the teacher's plans."""


@dataclass
class ScoreModelConfig:
    """Training on predicted scores that are corrected with measured ones after each round."""

    rounds: int = setting(0, low=0)
    """Rounds, each of which fits the score model again; the training steps are divided among
    them. 0 trains on measured scores only."""
    first_masks: int = setting(1000, low=1)
    """Masks measured before the first round, if no frontier table provides scores."""
    verify_requests: int = setting(128, low=1)
    """Requests on which the policy's plans are measured after each round: for each request the
    most probable plan, and the best of several sampled ones."""
    members: int = setting(5, low=1)
    """Predictors of the ensemble."""
    pessimism: float = setting(1.0, low=0)
    """Standard deviations of the ensemble that are added to a predicted ΔNLL."""


@dataclass
class FrontierConfig:
    """The frontier table that ``experiments.profile`` builds."""

    evaluations: int = setting(0, low=0)
    """Plans to score at most; 0 builds no table."""
    deepest_loss: float = setting(3.0, above=0)
    """Pairs of counts whose best mask is expected to have a larger ΔNLL, in nats per token, are
    left out."""
    requests: int = setting(512, low=1)
    """Workload requests that decide which pairs of counts, or which plans, are useful."""
    start: str | None = None
    """A table of plans of the same model, whose best plans are measured first."""


@dataclass
class LoggerConfig:
    """Loggers besides ``metrics.jsonl`` in the run folder, which is always written."""

    wandb: bool = False
    """Whether to log to Weights & Biases."""
    tensorboard: bool = False
    """Whether to log to TensorBoard."""
    project: str = "rap"
    """Project of wandb."""
    wandb_mode: str = setting("auto", choices=("auto", "online", "offline"))
    """``auto``: online if a login is found, else offline."""

"""Settings of the model, the environment and the agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from omegaconf import MISSING

from experiments.config.common import Count, Section, among
from experiments.config.plain import TASKS, completed, defaults
from rap_env.envs.config import ENVIRONMENTS
from rap_env.envs.config import EnvConfig as TaskConfig


@dataclass
class ModelConfig:
    """The language model that is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training only)."""
    device: str = "auto"
    """``auto`` (CUDA if there is a device), ``cpu``, or ``cuda``."""
    dtype: str = "auto"
    """``auto`` (the shortest that the processor has instructions for), ``bfloat16``, ``float16`` or
    ``float32``."""
    weights: str = "auto"
    """``bf16``: unquantised, in `dtype`; ``native``: as the model's file has them; ``int8`` or
    ``int4``; ``auto``: native if ``env.id`` is ``RAPLadder-v0``, else bf16."""


@dataclass
class EnvConfig(Section):
    """Settings of the environment other than workload and reward."""

    section = "env"
    id: Annotated[str, among(*ENVIRONMENTS)] = "RAPPrune-v0"
    """``RAPPrune-v0`` removes blocks; ``RAPLadder-v0`` lowers items by one level."""
    levels: Any = "all"
    """Levels of ``RAPLadder-v0``: a name of `rap_env.levels.LADDERS`, or lists by kind."""
    together: list[str] = field(default_factory=lambda: ["int8", "int4"])
    """Levels of ``RAPLadder-v0`` that all caches take together."""
    invalid_action_penalty: float = 0.1
    """What an invalid action costs."""
    max_invalid_actions: int = 10
    """Invalid actions after which an episode is truncated."""
    tasks: dict[str, Any] = field(default_factory=partial(defaults, TASKS))
    """Tasks of the accuracy reward; without names, the environment's default tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = completed("tasks", self.tasks, TASKS)

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
class AgentConfig(Section):
    """An algorithm and the length of its training."""

    section = "agent"
    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``, or an agent of another package."""
    label: str | None = None
    """Name of its runs in folders and tables; null for the agent's name."""
    total_timesteps: Count = 20_000
    """Steps of the environment until the training ends."""
    n_envs: Count = 8
    """Number of sub-environments; they share one model."""
    normalize_reward: bool = True
    """Whether rewards are divided by their running standard deviation."""
    policy_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the algorithm. Here and in `policy_settings`, null or a missing entry is
    replaced by the value in the agent's file in ``conf/agent``."""

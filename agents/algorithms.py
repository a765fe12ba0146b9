"""The learning algorithms by name, with hyperparameters that suit short episodes.

An episode removes some 5 to 30 blocks and is rewarded at its end with minus the loss of its
mask, so nothing is discounted (``gamma=1``) and few, well used episodes count more than many:
each costs an evaluation of the language model.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.masked_dqn import MaskedDQN
from agents.policies import (
    BlockwisePolicy,
    BlockwiseQPolicy,
    MaskableBlockwisePolicy,
    MaskedBlockwiseQPolicy,
)
from rap_env.errors import RapError, UnknownNameError


class AgentConfigError(RapError, ValueError):
    """A setting of an agent whose value is impossible."""


@dataclass(frozen=True)
class Algorithm:
    """A learning algorithm of stable-baselines3 and what it is used with here.

    Attributes:
        cls: The algorithm.
        policies: Its policy networks by name: ``blockwise`` and ``mlp``.
        defaults: Hyperparameters that differ from the library's.
        masked: Whether it sees which actions are valid; the others learn it from the penalty.
        checkpoint_steps: Environment steps after which a checkpoint is due.
    """

    cls: type[BaseAlgorithm]
    policies: Mapping[str, str | type[BasePolicy]]
    defaults: Mapping[str, Any]
    masked: bool
    checkpoint_steps: int

    def hyperparameters(self) -> list[str]:
        """Names of the settings that can be given."""
        return [name for name in inspect.signature(self.cls).parameters if name not in _RESERVED]


_RESERVED = {
    "policy",
    "env",
    "seed",
    "device",
    "verbose",
    "tensorboard_log",
    "stats_window_size",
    "_init_setup_model",
    "replay_buffer_class",
    "replay_buffer_kwargs",
    "rollout_buffer_class",
    "rollout_buffer_kwargs",
    "optimize_memory_usage",
}

_LAST_LEARNING_RATE = 0.1  # as a share of the first

_PPO_DEFAULTS = {
    "n_steps": 32,
    "batch_size": 128,
    "n_epochs": 8,
    "learning_rate": 1e-3,
    "gamma": 1.0,
    "gae_lambda": 0.98,
    "ent_coef": 0.005,
    "clip_range": 0.2,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "target_kl": 0.05,
}

_DQN_DEFAULTS = {
    "learning_rate": 1e-3,
    "buffer_size": 10_000,
    "learning_starts": 500,
    "batch_size": 64,
    "gamma": 1.0,
    "train_freq": 1,
    "gradient_steps": 4,
    "target_update_interval": 50,  # a terminal reward travels back a step at each
    "exploration_fraction": 0.3,
    "exploration_initial_eps": 1.0,
    "exploration_final_eps": 0.02,
    "max_grad_norm": 1.0,
}

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        cls=PPO,
        policies={"blockwise": BlockwisePolicy, "mlp": "MultiInputPolicy"},
        defaults=_PPO_DEFAULTS,
        masked=False,
        checkpoint_steps=1,
    ),
    "maskable_ppo": Algorithm(
        cls=MaskablePPO,
        policies={"blockwise": MaskableBlockwisePolicy, "mlp": "MultiInputPolicy"},
        defaults=_PPO_DEFAULTS,
        masked=True,
        checkpoint_steps=1,
    ),
    "dqn": Algorithm(
        cls=DQN,
        policies={"blockwise": BlockwiseQPolicy, "mlp": "MultiInputPolicy"},
        defaults=_DQN_DEFAULTS,
        masked=False,
        checkpoint_steps=1000,
    ),
    "masked_dqn": Algorithm(
        cls=MaskedDQN,
        policies={"blockwise": MaskedBlockwiseQPolicy, "mlp": "MultiInputPolicy"},
        defaults=_DQN_DEFAULTS,
        masked=True,
        checkpoint_steps=1000,
    ),
}

# Lowest and highest value of each hyperparameter that has a range of its own.
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 1.0),
    "n_steps": (1, math.inf),
    "batch_size": (2, math.inf),
    "n_epochs": (1, math.inf),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "clip_range": (1e-6, math.inf),
    "ent_coef": (0.0, math.inf),
    "vf_coef": (0.0, math.inf),
    "max_grad_norm": (1e-12, math.inf),
    "buffer_size": (1, math.inf),
    "learning_starts": (0, math.inf),
    "train_freq": (1, math.inf),
    "tau": (0.0, 1.0),
    "target_update_interval": (1, math.inf),
    "exploration_fraction": (0.0, 1.0),
    "exploration_initial_eps": (0.0, 1.0),
    "exploration_final_eps": (0.0, 1.0),
}


@dataclass(frozen=True)
class AgentConfig:
    """Which agent is trained, for how long and how.

    Attributes:
        name: ``ppo``, ``maskable_ppo``, ``dqn`` or ``masked_dqn``.
        policy: ``blockwise`` (one small network looks at every block) or ``mlp``.
        total_timesteps: Environment steps, one removed block each; PPO ends its last rollout.
        n_envs: Environments stepped together in one process; they share one model.
        seed: Seed of the networks, of exploration and of the requests.
        hyperparameters: Settings of the algorithm that differ from `Algorithm.defaults`.
        normalize_reward: Divide rewards by the running deviation of returns (`VecNormalize`);
            observations are in [0, 1] as they are.

    Raises:
        UnknownNameError: There is no such agent, policy or hyperparameter.
        AgentConfigError: A value is impossible.
    """

    name: str = "maskable_ppo"
    policy: str = "blockwise"
    total_timesteps: int = 10_000
    n_envs: int = 8
    seed: int = 0
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    normalize_reward: bool = True

    def __post_init__(self) -> None:
        if self.name not in ALGORITHMS:
            raise UnknownNameError("agent", self.name, ALGORITHMS)
        if self.policy not in self.algorithm.policies:
            raise UnknownNameError("policy", self.policy, self.algorithm.policies)
        for key, least in (("total_timesteps", 1), ("n_envs", 1), ("seed", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise AgentConfigError(
                    f"{key} must be a whole number of at least {least}, not {value!r}."
                )
        known = self.algorithm.hyperparameters()
        for key, value in self.hyperparameters.items():
            if key not in known:
                raise UnknownNameError(f"hyperparameter of {self.name!r}:", key, known)
            _check_range(key, value)
        _check_plain(self.hyperparameters)

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm that `name` stands for."""
        return ALGORITHMS[self.name]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for records."""
        return asdict(self)


def make_model(config: AgentConfig, venv: VecEnv) -> BaseAlgorithm:
    """A new, untrained model for the environments in `venv`.

    It lives on the CPU: the network is so small that a GPU would only slow it down. The
    learning rate falls linearly to a tenth over the training.
    """
    settings = {**config.algorithm.defaults, **config.hyperparameters}
    if "n_steps" in config.algorithm.defaults and "batch_size" not in config.hyperparameters:
        settings["batch_size"] = min(settings["batch_size"], settings["n_steps"] * venv.num_envs)
    rate = settings.pop("learning_rate")
    schedule = LinearSchedule(rate, _LAST_LEARNING_RATE * rate, end_fraction=1.0)
    return config.algorithm.cls(
        config.algorithm.policies[config.policy],
        venv,
        seed=config.seed,
        device="cpu",
        learning_rate=schedule,
        **settings,
    )


def _check_range(key: str, value: Any) -> None:
    if key not in _RANGES:
        return
    low, high = _RANGES[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise AgentConfigError(
            f"The hyperparameter {key!r} must be from {low:g} to {high:g}, not {value!r}."
        )


def _check_plain(values: dict[str, Any]) -> None:
    try:
        plain = json.loads(json.dumps(values)) == values
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise AgentConfigError(
            f"Hyperparameters must be plain numbers, words, lists and dicts, since they go into "
            f"checkpoints; not {values!r}."
        )

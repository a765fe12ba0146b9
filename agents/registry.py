"""The learning algorithms by name, with hyperparameters that suit short episodes.

An episode removes some 5 to 30 blocks and is rewarded at its end with minus the loss of its
mask, so nothing is discounted (``gamma=1``) and few, well used episodes count more than many:
each costs an evaluation of the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from agents.masked_dqn import MaskedDQN
from agents.policies import (
    BlockwisePolicy,
    BlockwiseQPolicy,
    MaskableBlockwisePolicy,
    MaskedBlockwiseQPolicy,
)


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

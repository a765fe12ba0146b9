"""Which agent is trained and how, and the untrained model that this makes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.errors import AgentConfigError
from agents.networks.settings import PolicySettings
from agents.registry import ALGORITHMS, Algorithm
from rap_env.errors import UnknownNameError

__all__ = ["ALGORITHMS", "AgentConfig", "AgentConfigError", "Algorithm", "make_model"]

_LAST_LEARNING_RATE = 0.1  # as a share of the first

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
        name: One of `ALGORITHMS`: ``ppo``, ``maskable_ppo``, ``dqn`` or
            ``masked_dqn``.
        policy: ``blockwise`` (one small network looks at every block) or ``mlp``.
        total_timesteps: Environment steps, one removed block each; PPO ends its last rollout.
        n_envs: Environments stepped together in one process; they share one model.
        seed: Seed of the networks, of exploration and of the requests.
        hyperparameters: Settings of the algorithm that differ from `Algorithm.defaults`.
        normalize_reward: Divide rewards by the running deviation of returns (`VecNormalize`);
            observations are in [0, 1] as they are.
        policy_settings: Settings of the block-wise policy that differ from those of
            `agents.networks.settings.PolicySettings`; ``mlp`` has none.

    Raises:
        UnknownNameError: There is no such agent, policy, setting or hyperparameter.
        AgentConfigError: A value is impossible.
    """

    name: str = "maskable_ppo"
    policy: str = "blockwise"
    total_timesteps: int = 10_000
    n_envs: int = 8
    seed: int = 0
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    normalize_reward: bool = True
    policy_settings: dict[str, Any] = field(default_factory=dict)

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
        _check_plain("Hyperparameters", self.hyperparameters)
        self._check_policy_settings()

    def _check_policy_settings(self) -> None:
        if self.policy == "mlp" and self.policy_settings:
            raise AgentConfigError(
                f"The policy 'mlp' has no policy_settings, but {self.policy_settings!r} was given; "
                "leave them out or choose policy='blockwise'."
            )
        PolicySettings.of(self.policy_settings)
        _check_plain("Policy settings", self.policy_settings)

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
    if config.policy == "blockwise":
        network = PolicySettings.of(config.policy_settings).policy_kwargs()
        settings["policy_kwargs"] = {**network, **(settings.get("policy_kwargs") or {})}
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


def _check_plain(what: str, values: dict[str, Any]) -> None:
    try:
        plain = json.loads(json.dumps(values)) == values
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise AgentConfigError(
            f"{what} must be plain numbers, words, lists and dicts, since they go into "
            f"checkpoints; not {values!r}."
        )

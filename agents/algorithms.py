"""The learning algorithms by name, the configuration of a training, and the untrained model.

An episode takes 5 to 60 actions and is rewarded at its end, so the hyperparameters in
``conf/agent`` do not discount (``gamma: 1``) and use each rollout often: an episode costs an
evaluation of the language model, an update costs little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.hyperparameters import (
    HYPERPARAMETERS,
    AgentConfigError,
    PolicySettings,
    Settings,
    with_defaults,
)
from agents.sb3_policies import (
    BlockwisePolicy,
    BlockwiseQPolicy,
    MaskableBlockwisePolicy,
    MaskedBlockwiseQPolicy,
)
from rap_env.plugins import PluginError, find_plugin
from rap_env.specs import check, setting

_LAST_LEARNING_RATE = 0.1  # as a share of the first

_Observation = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]
_State = tuple[npt.NDArray[Any], ...] | None


class MaskedDQN(DQN):
    """DQN of stable-baselines3 that never chooses an invalid action.

    The mask is the observation's ``action_mask``, so the replay buffer also holds that of the
    next state, and the masked Q networks of `agents.sb3_policies` apply it to greedy actions and
    to the maximum in the target. This class restricts random exploration.
    """

    def predict(
        self,
        observation: _Observation,
        state: _State = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], _State]:
        """Return a greedy action or, at the exploration rate, a random valid one."""
        if deterministic or np.random.rand() >= self.exploration_rate:
            return self.policy.predict(observation, state, episode_start, deterministic)
        actions = _random_valid(observation)
        many = self.policy.is_vectorized_observation(observation)
        return (actions if many else actions[0]), state

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if self.num_timesteps >= learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        actions = _random_valid(self._last_obs)
        return actions, actions


@dataclass(frozen=True)
class Algorithm:
    """A learning algorithm of stable-baselines3, or of another package in its manner.

    Attributes:
        cls: Its class; `make_model` calls it, and checkpoints call its ``load``.
        blockwise: The class of its block-wise policy.
        hyperparameters: Its hyperparameters with their ranges; a subclass of `Settings`.
        masked: Whether it uses action masks; the others learn from the penalty instead.
        checkpoint_steps: Environment steps between checkpoints; a rollout is always finished.
    """

    cls: type[BaseAlgorithm]
    blockwise: type[BasePolicy]
    hyperparameters: type[Settings]
    masked: bool = False
    checkpoint_steps: int = 1


_STEPS_OF_DQN = 1000

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(PPO, BlockwisePolicy, HYPERPARAMETERS["ppo"]),
    "maskable_ppo": Algorithm(
        MaskablePPO, MaskableBlockwisePolicy, HYPERPARAMETERS["maskable_ppo"], masked=True
    ),
    "dqn": Algorithm(DQN, BlockwiseQPolicy, HYPERPARAMETERS["dqn"], checkpoint_steps=_STEPS_OF_DQN),
    "masked_dqn": Algorithm(
        MaskedDQN, MaskedBlockwiseQPolicy, HYPERPARAMETERS["masked_dqn"], True, _STEPS_OF_DQN
    ),
}
"""Our agents by name."""


def find_algorithm(name: str) -> Algorithm:
    """Return an algorithm by its name, one of `ALGORITHMS` or of another package.

    Raises:
        UnknownNameError: There is no such agent.
        PluginError: The agent of another package cannot be loaded, or is no `Algorithm`.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    plugin = find_plugin("agent", name, ALGORITHMS)
    algorithm = plugin.load()
    if not isinstance(algorithm, Algorithm):
        raise PluginError(
            f"{plugin} is a {type(algorithm).__name__}, not an agents.algorithms.Algorithm."
        )
    return algorithm


@dataclass(frozen=True)
class AgentConfig:
    """Configuration of a training: the agent, its length and its settings.

    Attributes:
        name: One of `ALGORITHMS` (``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``), the name of
            an entry point of another package, or ``package.module:name`` of an `Algorithm`.
        total_timesteps: Environment steps, one action each; PPO finishes its last rollout.
        n_envs: Environments stepped together in one process; they share one model.
        seed: Seed of the networks, of exploration and of the requests.
        hyperparameters: Settings of the algorithm (`Algorithm.hyperparameters`). Settings that
            are not given have the values of ``conf/agent/NAME.yaml``.
        normalize_reward: Divide rewards by the running deviation of returns (`VecNormalize`);
            observations are in [0, 1] already.
        policy_settings: Settings of the block-wise policy
            (`agents.hyperparameters.PolicySettings`), completed in the same way.

    Raises:
        UnknownNameError: There is no such agent, setting or hyperparameter.
        AgentConfigError: A value is impossible.
        PluginError: The agent of another package cannot be loaded.
    """

    name: str = "maskable_ppo"
    total_timesteps: int = setting(10_000, low=1)
    n_envs: int = setting(8, low=1)
    seed: int = setting(0, low=0)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    normalize_reward: bool = True
    policy_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        algorithm = self.algorithm
        check(self, AgentConfigError)
        values = with_defaults(self.name, "hyperparameters", self.hyperparameters)
        algorithm.hyperparameters.of(values, f"the agent {self.name!r}")
        object.__setattr__(self, "hyperparameters", values)
        settings = with_defaults(self.name, "policy_settings", self.policy_settings)
        PolicySettings.of(settings, "the block-wise policy")
        object.__setattr__(self, "policy_settings", settings)

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm with this `name`."""
        return find_algorithm(self.name)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for records."""
        return asdict(self)


def make_model(config: AgentConfig, venv: VecEnv) -> BaseAlgorithm:
    """Make an untrained model for the environments in `venv`.

    It lives on the CPU, since a GPU would slow down so small a network. The learning rate falls
    linearly to a tenth over the training.
    """
    settings = dict(config.hyperparameters)
    if "n_steps" in settings:  # a mini-batch cannot be larger than the rollout
        settings["batch_size"] = min(settings["batch_size"], settings["n_steps"] * venv.num_envs)
    rate = settings.pop("learning_rate")
    settings["policy_kwargs"] = PolicySettings(**config.policy_settings).policy_kwargs()
    return config.algorithm.cls(
        config.algorithm.blockwise,
        venv,
        seed=config.seed,
        device="cpu",
        learning_rate=LinearSchedule(rate, _LAST_LEARNING_RATE * rate, end_fraction=1.0),
        **settings,
    )


def _random_valid(observation: _Observation) -> npt.NDArray[np.int64]:
    """Return random valid actions, from NumPy's global generator (seeded by SB3)."""
    assert isinstance(observation, dict)
    valid = np.atleast_2d(observation["action_mask"]) > 0.5
    chosen = np.where(valid, np.random.random(valid.shape), -1).argmax(axis=1)
    return np.asarray(chosen, dtype=np.int64)

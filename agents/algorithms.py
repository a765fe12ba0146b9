"""The learning algorithms by name, the configuration of a training, and the untrained model.

An episode takes 5 to 60 actions and is rewarded at its end, so the hyperparameters in
``conf/agent`` do not discount (``gamma: 1``) and use each rollout often: an episode costs an
evaluation of the language model, an update costs little. The values are in
``conf/agent/NAME.yaml``, here or in the package that brings the agent, and nowhere else; what
a caller does not give is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.networks import (
    BlockwisePolicy,
    BlockwiseQPolicy,
    MaskableBlockwisePolicy,
    MaskedBlockwiseQPolicy,
)
from rap_env.errors import RapError
from rap_env.plugins import PluginError, find_plugin
from rap_env.policies.network_rows import ABLATIONS
from rap_env.specs import check, check_settings, setting, settings_of

_FOLDER = Path(__file__).parent.parent / "conf" / "agent"


class AgentConfigError(RapError, ValueError):
    """A setting of an agent has an impossible value."""


@dataclass(frozen=True)
class Settings:
    """Base of a group of settings, whose fields `rap_env.specs.setting` makes.

    Raises:
        AgentConfigError: A value has another type or is out of its range.
        UnknownNameError: A name is not among the choices.
    """

    section: ClassVar[str] = "hyperparameters"

    def __post_init__(self) -> None:
        check(self, AgentConfigError, path=f"{self.section}.")

    @classmethod
    def of(cls, values: Mapping[str, Any], owner: str) -> Self:
        """Make the settings from a dict that has all of them."""
        check_settings(values, owner, settings_of(cls))
        missing = [key for key in settings_of(cls) if key not in values]
        if missing:
            raise AgentConfigError(f"The {cls.section} of {owner} lack {', '.join(missing)}.")
        return cls(**values)


@dataclass(frozen=True)
class PPOHyperparameters(Settings):
    """Hyperparameters of ``ppo`` and ``maskable_ppo``; names as in stable-baselines3.

    Attributes:
        learning_rate: Adam's first learning rate; it falls linearly to a tenth over the
            training.
        n_steps: Steps of each sub-environment in a rollout.
        batch_size: Steps in a mini-batch; limited to the size of the rollout.
        n_epochs: Passes over each rollout.
        gamma: Discount factor.
        gae_lambda: Trade-off of bias and variance in generalised advantage estimation.
        clip_range: Largest change of the probability ratio.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        max_grad_norm: Norm to which gradients are clipped.
        target_kl: KL divergence that stops an update early; None never stops one.
    """

    learning_rate: float = setting(above=0, high=1)
    n_steps: int = setting(low=1)
    batch_size: int = setting(low=2)
    n_epochs: int = setting(low=1)
    gamma: float = setting(low=0, high=1)
    gae_lambda: float = setting(low=0, high=1)
    clip_range: float = setting(above=0)
    ent_coef: float = setting(low=0)
    vf_coef: float = setting(low=0)
    max_grad_norm: float = setting(above=0)
    target_kl: float | None = setting(above=0)


@dataclass(frozen=True)
class DQNHyperparameters(Settings):
    """Hyperparameters of ``dqn`` and ``masked_dqn``; names as in stable-baselines3.

    Attributes:
        learning_rate: Adam's first learning rate; it falls linearly to a tenth over the
            training.
        buffer_size: Transitions in the replay buffer.
        learning_starts: Steps before the first update.
        batch_size: Transitions in a mini-batch.
        gamma: Discount factor.
        train_freq: Steps of each sub-environment between updates.
        gradient_steps: Mini-batches of an update; -1 for as many as there were steps.
        target_update_interval: Steps between copies of the network to the target network.
        exploration_fraction: Share of the training over which exploration falls.
        exploration_initial_eps: Probability of a random action at the start.
        exploration_final_eps: Probability of a random action afterwards.
        max_grad_norm: Norm to which gradients are clipped.
    """

    learning_rate: float = setting(above=0, high=1)
    buffer_size: int = setting(low=1)
    learning_starts: int = setting(low=0)
    batch_size: int = setting(low=2)
    gamma: float = setting(low=0, high=1)
    train_freq: int = setting(low=1)
    gradient_steps: int = setting(low=-1)
    target_update_interval: int = setting(low=1)
    exploration_fraction: float = setting(low=0, high=1)
    exploration_initial_eps: float = setting(low=0, high=1)
    exploration_final_eps: float = setting(low=0, high=1)
    max_grad_norm: float = setting(above=0)


@dataclass(frozen=True)
class PolicySettings(Settings):
    """Settings of the block-wise policy.

    Attributes:
        hidden: Units of each hidden layer.
        block_vectors: Width of a learned vector for each block or item, which its row
            carries; 0 for none. Improves the policy on its own model, but it then does not
            transfer to a model with another number of layers.
        without: Features hidden from the network, each an ablation: ``gsi`` (rank and
            marginal rise in NLL; those of the order over items), ``one_shot`` (the one-shot
            rise in NLL), ``request`` (the request, and what a block or item frees for it: in
            RAPPrune the policy is then one static order of removal), ``kind`` (which kind a
            block or item is of) and ``depth`` (in which layer it is); without one of them, an
            item has no neighbours.
    """

    section: ClassVar[str] = "policy_settings"

    hidden: int = setting(low=1)
    block_vectors: int = setting(low=0)
    without: list[str] = setting(choices=ABLATIONS)

    def policy_kwargs(self) -> dict[str, Any]:
        """Return the same settings as ``policy_kwargs`` of stable-baselines3."""
        extractor = asdict(self)
        return {"hidden": extractor.pop("hidden"), "features_extractor_kwargs": extractor}


HYPERPARAMETERS: dict[str, type[Settings]] = {
    "ppo": PPOHyperparameters,
    "maskable_ppo": PPOHyperparameters,
    "dqn": DQNHyperparameters,
    "masked_dqn": DQNHyperparameters,
}
"""Our agents by name, and the hyperparameters that each has."""


def with_defaults(name: str, section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete settings with the values of the agent's file in ``conf/agent``.

    Args:
        name: The agent, one of `HYPERPARAMETERS` or of another package.
        section: ``hyperparameters`` or ``policy_settings``.
        given: Settings that replace those of the file, as plain values.
    """
    own = _values(_FOLDER / f"{name}.yaml") if name in HYPERPARAMETERS else {}
    return {**own.get(section, {}), **given}


@cache
def _values(path: Path) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(values)


_LAST_LEARNING_RATE = 0.1  # as a share of the first

_Observation = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]
_State = tuple[npt.NDArray[Any], ...] | None


class MaskedDQN(DQN):
    """DQN of stable-baselines3 that never chooses an invalid action.

    The mask is the observation's ``action_mask``, so the replay buffer also holds that of the
    next state, and the masked Q networks of `agents.networks` apply it to greedy actions and
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
        name: One of `ALGORITHMS` (``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``), or
            ``package.module:name`` of an `Algorithm`.
        total_timesteps: Environment steps, one action each; PPO finishes its last rollout.
        n_envs: Environments stepped together in one process; they share one model.
        seed: Seed of the networks, of exploration and of the requests.
        hyperparameters: Settings of the algorithm (`Algorithm.hyperparameters`). Settings
            that are not given have the values of ``conf/agent/NAME.yaml``.
        policy_settings: Settings of the block-wise policy
            (`agents.algorithms.PolicySettings`), completed in the same way.

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

    It lives on the CPU, since a GPU would slow down so small a network. The learning rate
    falls linearly to a tenth over the training.
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

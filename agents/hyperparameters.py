"""The settings of agents: which there are, their types and ranges.

Their values are in ``conf/agent/NAME.yaml``, here or in the package that brings the agent, and
nowhere else; what a caller does not give is taken from there. Importing this module loads neither
torch nor stable-baselines3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from omegaconf import OmegaConf

from rap_env.errors import RapError
from rap_env.plugins import find_plugin
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
        learning_rate: Adam's first learning rate; it falls linearly to a tenth over the training.
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
        learning_rate: Adam's first learning rate; it falls linearly to a tenth over the training.
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
        block_vectors: Width of a learned vector for each block or item, which its row carries; 0
            for none. Improves the policy on its own model, but it then does not transfer to a
            model with another number of layers.
        without: Features hidden from the network, each an ablation: ``gsi`` (rank and marginal
            rise in NLL; those of the order over items), ``one_shot`` (the one-shot rise in
            NLL), ``request`` (the request, and what a block or item frees for it: in RAPPrune the
            policy is then one static order of removal), ``kind`` (which kind a block or item is
            of) and ``depth`` (in which layer it is); without one of them, an item has no
            neighbours.
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

    Raises:
        UnknownNameError: There is no such agent.
    """
    if name in HYPERPARAMETERS:
        path: Path | None = _FOLDER / f"{name}.yaml"
    else:
        path = find_plugin("agent", name, HYPERPARAMETERS).values_file
    return {**(_values(path).get(section, {}) if path else {}), **given}


@cache
def _values(path: Path) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(values)

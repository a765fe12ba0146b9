"""The settings of agents: which there are, their types and ranges.

Their values are in ``conf/agent/NAME.yaml``, here or in the package that brings the agent, and
nowhere else; what a caller does not give is taken from there. Importing this module loads neither
torch nor stable-baselines3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_origin, get_type_hints

from omegaconf import OmegaConf

from rap_env.errors import RapError, UnknownNameError
from rap_env.plugins import find_plugin
from rap_env.policies.network_rows import ABLATIONS

_FOLDER = Path(__file__).parent.parent / "conf" / "agent"


class AgentConfigError(RapError, ValueError):
    """A setting of an agent has an impossible value."""


class Range(NamedTuple):
    """The lowest and the highest allowed value."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Settings:
    """A group of numeric settings, whose annotations state the allowed values.

    Raises:
        AgentConfigError: A value has another type or is out of its range.
    """

    section: ClassVar[str] = "hyperparameters"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(hint) is Annotated:
                _check_number(f"{self.section}.{name}", getattr(self, name), hint)

    @classmethod
    def of(cls, values: Mapping[str, Any], owner: str) -> Self:
        """Make the settings from a dict that has all of them."""
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                raise UnknownNameError(f"{cls.section} of {owner}:", key, known)
        missing = [key for key in known if key not in values]
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

    learning_rate: Annotated[float, Range(1e-12, 1)]
    n_steps: Annotated[int, Range(1)]
    batch_size: Annotated[int, Range(2)]
    n_epochs: Annotated[int, Range(1)]
    gamma: Annotated[float, Range(0, 1)]
    gae_lambda: Annotated[float, Range(0, 1)]
    clip_range: Annotated[float, Range(1e-6)]
    ent_coef: Annotated[float, Range(0)]
    vf_coef: Annotated[float, Range(0)]
    max_grad_norm: Annotated[float, Range(1e-12)]
    target_kl: Annotated[float | None, Range(1e-12)]


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

    learning_rate: Annotated[float, Range(1e-12, 1)]
    buffer_size: Annotated[int, Range(1)]
    learning_starts: Annotated[int, Range(0)]
    batch_size: Annotated[int, Range(2)]
    gamma: Annotated[float, Range(0, 1)]
    train_freq: Annotated[int, Range(1)]
    gradient_steps: Annotated[int, Range(-1)]
    target_update_interval: Annotated[int, Range(1)]
    exploration_fraction: Annotated[float, Range(0, 1)]
    exploration_initial_eps: Annotated[float, Range(0, 1)]
    exploration_final_eps: Annotated[float, Range(0, 1)]
    max_grad_norm: Annotated[float, Range(1e-12)]


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

    Raises:
        UnknownNameError: There is no such ablation.
        AgentConfigError: A value is impossible.
    """

    section: ClassVar[str] = "policy_settings"

    hidden: Annotated[int, Range(1)]
    block_vectors: Annotated[int, Range(0)]
    without: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.without, list | tuple):
            raise AgentConfigError(
                f"policy_settings.without must be a list of ablations, not {self.without!r}."
            )
        for name in self.without:
            if name not in ABLATIONS:
                raise UnknownNameError("ablation in policy_settings.without:", name, ABLATIONS)
        object.__setattr__(self, "without", tuple(self.without))

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


def _check_number(name: str, value: Any, hint: Any) -> None:
    """Check a value against a type and a range."""
    kind, (allowed,) = hint.__origin__, hint.__metadata__
    if value is None and kind == float | None:
        return
    number, what = (int, "a whole number") if kind is int else (int | float, "a number")
    right_type = isinstance(value, number) and not isinstance(value, bool)
    if not right_type or not allowed.low <= value <= allowed.high:
        limits = f"of at least {allowed.low:g}"
        if allowed.high < math.inf:
            limits = f"from {allowed.low:g} to {allowed.high:g}"
        raise AgentConfigError(f"{name} must be {what} {limits}, not {value!r}.")

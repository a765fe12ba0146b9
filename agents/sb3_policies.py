"""Policy classes of stable-baselines3 with the networks of `agents.networks`.

Block-wise means that one small network scores each action: each block or item.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, MultiInputPolicy, QNetwork
from torch import nn

from agents.networks import ActorCriticHeads, DuelingHeads, Rows
from rap_env.ladder.observation import Observation

Q_INVALID = -1e8
"""Q value of an invalid action; finite, since 0 times infinity is NaN."""


class _Blockwise:
    """Mixin for policies that observe rows and have `hidden` units in each layer."""

    def __init__(
        self, observation_space: spaces.Space[Any], *args: Any, hidden: int, **kwargs: Any
    ) -> None:
        self.hidden = hidden
        kwargs.setdefault("features_extractor_class", Rows)
        super().__init__(observation_space, *args, **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]
        return {**parameters, "hidden": self.hidden}


class _BlockwiseActorCritic(_Blockwise):
    """Mixin that builds block-wise heads in place of an actor-critic policy's MLPs."""

    mlp_extractor: Any
    action_net: Any
    value_net: Any
    optimizer: Any

    def _build(self: Any, lr_schedule: Schedule) -> None:
        self.mlp_extractor = ActorCriticHeads(self.features_dim, self.hidden)
        self.action_net = nn.Identity()  # the actor returns the logits
        self.value_net = nn.Identity()
        self.optimizer = self.optimizer_class(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )


class BlockwisePolicy(_BlockwiseActorCritic, ActorCriticPolicy):
    """Block-wise policy for PPO; it learns from the penalty to choose valid actions."""


class MaskableBlockwisePolicy(_BlockwiseActorCritic, MaskableActorCriticPolicy):  # type: ignore[misc]
    """Block-wise policy for MaskablePPO."""


class BlockwiseQNetwork(QNetwork):
    """Q network with `DuelingHeads`."""

    def __init__(self, *args: Any, hidden: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden = hidden
        self.q_net = DuelingHeads(self.features_dim, hidden)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self.hidden}


class MaskedBlockwiseQNetwork(BlockwiseQNetwork):
    """Block-wise Q network that never chooses an invalid action."""

    def forward(self, obs: PyTorchObs) -> torch.Tensor:
        """Return Q values, those of invalid actions below all others."""
        values: torch.Tensor = super().forward(obs)
        valid = cast(dict[str, torch.Tensor], obs)["action_mask"] > 0.5
        return values.masked_fill(~valid.reshape(values.shape), Q_INVALID)


class BlockwiseQPolicy(_Blockwise, MultiInputPolicy):
    """Block-wise policy for DQN, with the network class `q_net_class`."""

    q_net_class: type[QNetwork] = BlockwiseQNetwork

    def make_q_net(self) -> QNetwork:
        """Make the network with its own features extractor."""
        self.net_args["hidden"] = self.hidden
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return self.q_net_class(**arguments).to(self.device)


class MaskedBlockwiseQPolicy(BlockwiseQPolicy):
    """Block-wise policy for masked DQN."""

    q_net_class = MaskedBlockwiseQNetwork


def action_scores(policy: BasePolicy, observation: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the Q values or logits of a policy of any agent.

    Returns:
        Q values or logits (without a mask), shape (B, N).
    """
    if isinstance(policy, DQNPolicy):
        return cast(torch.Tensor, policy.q_net(observation))
    actor = cast(ActorCriticPolicy, policy)
    seen = BasePolicy.extract_features(policy, observation, actor.pi_features_extractor)
    return cast(torch.Tensor, actor.action_net(actor.mlp_extractor.forward_actor(seen)))


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """Return an observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}

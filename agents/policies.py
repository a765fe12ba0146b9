"""Policies of stable-baselines3 whose network looks at every block in turn (`agents.networks`).

The number of parameters does not depend on the number of layers L, so the same network serves
a model with any number of them, unless each block has a learned vector of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, MultiInputPolicy, QNetwork
from torch import nn

from agents.networks.heads import ActorCriticHeads, DuelingHeads
from agents.networks.rows import BlockRows
from agents.networks.settings import HIDDEN

Q_INVALID = -1e8
"""Q value of a block that is already gone; finite, since 0 times infinity is not a number."""


class _BlockwiseActorCritic:
    """Builds block-wise heads where an actor-critic policy would build its MLPs."""

    mlp_extractor: Any
    action_net: Any
    value_net: Any
    optimizer: Any

    def __init__(self, *args: Any, hidden: int = HIDDEN, **kwargs: Any) -> None:
        self.hidden = hidden
        kwargs.setdefault("features_extractor_class", BlockRows)
        super().__init__(*args, **kwargs)

    def _build(self: Any, lr_schedule: Schedule) -> None:
        self.mlp_extractor = ActorCriticHeads(self.features_dim, self.hidden)
        self.action_net = nn.Identity()  # the actor's numbers are the logits
        self.value_net = nn.Identity()
        self.optimizer = self.optimizer_class(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]
        return {**found, "hidden": self.hidden}


class BlockwisePolicy(_BlockwiseActorCritic, ActorCriticPolicy):
    """Block-wise policy for PPO, which learns from the penalty that removed blocks stay away."""


class MaskableBlockwisePolicy(_BlockwiseActorCritic, MaskableActorCriticPolicy):  # type: ignore[misc]
    """Block-wise policy for MaskablePPO."""


class BlockwiseQNetwork(QNetwork):
    """A Q value for each block: a value of the whole observation plus each block's advantage."""

    def __init__(self, *args: Any, hidden: int = HIDDEN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden = hidden
        self.q_net = DuelingHeads(self.features_dim, hidden)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self.hidden}


class _MaskedForward:
    """Gives blocks that are gone a Q value that no maximum chooses."""

    def forward(self, obs: PyTorchObs) -> torch.Tensor:
        values: torch.Tensor = super().forward(obs)  # type: ignore[misc]
        valid = cast(dict[str, torch.Tensor], obs)["action_mask"] > 0.5
        return values.masked_fill(~valid.reshape(values.shape), Q_INVALID)


class MaskedQNetwork(_MaskedForward, QNetwork):
    """An MLP of Q values that never chooses a removed block."""


class MaskedBlockwiseQNetwork(_MaskedForward, BlockwiseQNetwork):
    """Block-wise Q values that never choose a removed block."""


class _QPolicy(MultiInputPolicy):
    """A DQN policy whose network is chosen by class."""

    q_net_class: type[QNetwork] = QNetwork

    def make_q_net(self) -> QNetwork:
        """The network, with a features extractor of its own."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return self.q_net_class(**arguments).to(self.device)


class MaskedMlpQPolicy(_QPolicy):
    """Plain MLP for masked DQN."""

    q_net_class = MaskedQNetwork


class BlockwiseQPolicy(_QPolicy):
    """Block-wise policy for DQN."""

    q_net_class = BlockwiseQNetwork

    def __init__(self, *args: Any, hidden: int = HIDDEN, **kwargs: Any) -> None:
        self.hidden = hidden
        kwargs.setdefault("features_extractor_class", BlockRows)
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> QNetwork:
        """The network, with a features extractor of its own."""
        self.net_args["hidden"] = self.hidden
        return super().make_q_net()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self.hidden}


class MaskedBlockwiseQPolicy(BlockwiseQPolicy):
    """Block-wise policy for masked DQN."""

    q_net_class = MaskedBlockwiseQNetwork


def action_scores(policy: BasePolicy, observation: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a network thinks of each block, whatever agent it was trained with.

    Args:
        policy: An actor-critic or a DQN policy.
        observation: B observations as tensors.

    Returns:
        Q values or logits (without a mask), shape (B, 2L).
    """
    if isinstance(policy, DQNPolicy):
        return cast(torch.Tensor, policy.q_net(observation))
    actor = cast(ActorCriticPolicy, policy)
    seen = BasePolicy.extract_features(policy, observation, actor.pi_features_extractor)
    return cast(torch.Tensor, actor.action_net(actor.mlp_extractor.forward_actor(seen)))

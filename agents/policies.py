"""Block-wise policies: one small network that looks at every block in turn.

Shapes: B observations, 2L blocks, F features of a block, R entries of the request, W = the
width of a row that the network sees, H hidden units. The number of parameters does not depend
on L, so the same network serves a model with any number of layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import MultiInputPolicy, QNetwork
from torch import nn

from rap_env.envs.observation import BLOCK_FEATURES, REQUEST_FEATURES

Q_INVALID = -1e8
"""Q value of a block that is already gone; finite, since 0 times infinity is not a number."""

_HIDDEN = 32
_OVER = REQUEST_FEATURES.index("bytes_over")
_FREED = BLOCK_FEATURES.index("freed_share")
_PRICED = [BLOCK_FEATURES.index(name) for name in ("one_shot_loss", "gsi_marginal_loss")]


class BlockRows(BaseFeaturesExtractor):
    """Joins each block's features with what holds for the whole request.

    A row is: the block's features; the same and the prices below standardised over the kept
    blocks, so that what matters is how a block compares with the others, whatever the model's
    size; the share of the bytes still over budget that the block would free, at most 1; whether
    it is kept; the request; the mean features of the kept and of the removed blocks; and the
    share of blocks removed. A price is the log of a measured importance per useful byte: a
    ratio that a small network would need many episodes to find.

    Args:
        observation_space: That of `rap_env.envs.observation.ObservationBuilder`: a ``Dict``
            with ``request`` (R,), ``blocks`` (2L, F) and ``action_mask`` (2L,).
    """

    def __init__(self, observation_space: spaces.Dict) -> None:
        features = _shape(observation_space, "blocks")[1]
        request = _shape(observation_space, "request")[0]
        width = 4 * features + len(_PRICED) + request + 3
        super().__init__(observation_space, features_dim=width)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows of shape (B, 2L, W)."""
        blocks, request = observations["blocks"], observations["request"]
        kept = observations["action_mask"].to(blocks.dtype).unsqueeze(-1)
        removed = 1 - kept
        over = request[:, _OVER].reshape(-1, 1, 1)
        useful = (blocks[:, :, [_FREED]] / (over + 1e-6)).clamp(max=1) * kept
        prices = torch.log((blocks[:, :, _PRICED] + 1e-2) / (useful + 1e-3))
        compared = _standardised(torch.cat([blocks, prices], dim=2), kept)
        whole = torch.cat(
            [request, _mean(blocks, kept), _mean(blocks, removed), removed.mean(dim=1)], dim=1
        )
        whole = whole.unsqueeze(1).expand(-1, blocks.shape[1], -1)
        return torch.cat([blocks, compared, useful, kept, whole], dim=2)


class BlockScores(nn.Module):
    """One number for each block; starts near 0 for all, so the first choices are near uniform.

    A linear path beside the small network finds in fewer episodes which features count.

    Args:
        row_width: W.
        hidden: H.
    """

    def __init__(self, row_width: int, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.net = _mlp(row_width, hidden, last_gain=0.01)
        self.linear = nn.Linear(row_width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to scores (B, 2L)."""
        return cast(torch.Tensor, self.net(rows) + self.linear(rows)).squeeze(-1)


class PooledValue(nn.Module):
    """One number for the whole observation: the mean over blocks of what a network sees in each.

    Args:
        row_width: W.
        hidden: H.
    """

    def __init__(self, row_width: int, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.rows = nn.Sequential(_linear(row_width, hidden), nn.ReLU())
        self.value = nn.Sequential(_linear(hidden, hidden), nn.ReLU(), _linear(hidden, 1, gain=1.0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to values (B, 1)."""
        return cast(torch.Tensor, self.value(self.rows(rows).mean(dim=1)))


class ActorCriticHeads(nn.Module):
    """Stands where stable-baselines3 has an MLP extractor, and gives logits and value directly."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.actor = BlockScores(row_width, hidden)
        self.critic = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, 2L) and values (B, 1)."""
        return self.actor(rows), self.critic(rows)

    def forward_actor(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2L)."""
        return cast(torch.Tensor, self.actor(rows))

    def forward_critic(self, rows: torch.Tensor) -> torch.Tensor:
        """Values (B, 1)."""
        return cast(torch.Tensor, self.critic(rows))


class _BlockwiseActorCritic:
    """Builds block-wise heads where an actor-critic policy would build its MLPs."""

    mlp_extractor: Any
    action_net: Any
    value_net: Any
    optimizer: Any

    def __init__(self, *args: Any, hidden: int = _HIDDEN, **kwargs: Any) -> None:
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

    def __init__(self, *args: Any, hidden: int = _HIDDEN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden = hidden
        self.q_net = _Dueling(self.features_dim, hidden)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self.hidden}


class _Dueling(nn.Sequential):
    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.advantage = BlockScores(row_width, hidden)
        self.value = PooledValue(row_width, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, 2L, W) to Q values (B, 2L)."""
        return cast(torch.Tensor, self.value(rows) + self.advantage(rows))


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

    def __init__(self, *args: Any, hidden: int = _HIDDEN, **kwargs: Any) -> None:
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


def _mlp(width: int, hidden: int, last_gain: float) -> nn.Sequential:
    return nn.Sequential(
        _linear(width, hidden),
        nn.ReLU(),
        _linear(hidden, hidden),
        nn.ReLU(),
        _linear(hidden, 1, last_gain),
    )


def _linear(width: int, out: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean over blocks, (B, 2L, F) to (B, F); 0 where all weights are."""
    return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _standardised(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean of the kept blocks, in units of their spread; 0 for the others."""
    centred = (values - _mean(values, kept).unsqueeze(1)) * kept
    spread = _mean(centred.square(), kept).sqrt().unsqueeze(1)
    return (centred / (spread + 1e-4)).clamp(-3, 3)


def _shape(space: spaces.Dict, key: str) -> tuple[int, ...]:
    return cast(tuple[int, ...], space[key].shape)

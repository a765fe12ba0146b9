"""The policy network in torch: what it observes (rows), its outputs (heads), its policies.

Shapes: B observations, N blocks or items, F features of each, R
entries of the request, W = width of a row, H hidden units. The number of parameters does not
depend on N, unless each block or item has a learned vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, MultiInputPolicy, QNetwork
from torch import nn

from rap_env.ladder.observation import Observation
from rap_env.policies.network_rows import ROWS

_VECTOR_SPREAD = 0.3


class RowParts(NamedTuple):
    """The columns of rows, from the first to the last, without the repetition of shared ones.

    Attributes:
        own: What each row has of its own, (B, N, O).
        vectors: The learned vectors, equal in all observations, (N, V).
        shared: What all rows of an observation have, (B, S); W = O + V + S.
    """

    own: torch.Tensor
    vectors: torch.Tensor
    shared: torch.Tensor


class Rows(BaseFeaturesExtractor):
    """Joins the features of each block or item with those of the whole request.

    Standardised features compare a block or item with the others, independently of the
    model's size. A price is the log of a measured importance per useful byte, a ratio that a
    small network would need many episodes to learn. Neighbours are included because a block
    next to a removed one is often less important; which items are neighbours is read from the
    observed kinds and depths, so that one network serves ladders of any size.
    `rap_env.policies.network_rows` lists the parts of a row, and the network of the runtime
    computes the same rows.

    Args:
        observation_space: A ``Dict`` with ``request`` (R,), ``blocks`` or ``ladder`` (N, F)
            and ``action_mask`` (N,).
        block_vectors: As in `agents.algorithms.PolicySettings`.
        without: As in `PolicySettings`; hidden features are 0.

    Attributes:
        spec: What the rows are made of.
        columns: The parts of a row, with their columns.
    """

    vectors: torch.Tensor

    def __init__(
        self, observation_space: spaces.Dict, block_vectors: int = 0, without: Sequence[str] = ()
    ) -> None:
        (key,) = ROWS.keys() & observation_space.spaces.keys()
        self.spec = spec = ROWS[key]
        super().__init__(observation_space, features_dim=spec.width(block_vectors))
        self.columns = spec.columns(block_vectors)
        features, prices, request = map(torch.from_numpy, spec.shown(without))
        self._shown = features, prices, request
        count = cast(tuple[int, ...], observation_space[spec.key].shape)[0]
        vectors = _VECTOR_SPREAD * torch.randn(count, block_vectors)
        if block_vectors:
            self.vectors = nn.Parameter(vectors)
        else:  # not in the state dict, so that the network serves any number of blocks
            self.register_buffer("vectors", vectors, persistent=False)
        self._placed, self._near = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def forward(self, observations: dict[str, torch.Tensor]) -> RowParts:
        """Return the rows."""
        near = self._neighbours(observations[self.spec.key] * self._shown[0])
        own, shared = self.spec.parts(torch, observations, self._shown, near, self.vectors)
        return RowParts(own, self.vectors, shared)

    def _neighbours(self, each: torch.Tensor) -> torch.Tensor:
        """The neighbours of each row, (B, N, M)."""
        placed = each[:, :, : self.spec.features.index("depth") + 1]
        if placed.shape != self._placed.shape or not torch.equal(placed, self._placed):
            self._placed = placed.clone()
            models, which = torch.unique(placed.flatten(1), return_inverse=True, dim=0)
            rows = models.view(-1, *placed.shape[1:]).numpy()
            near = np.stack([self.spec.neighbours(of_model) for of_model in rows])
            self._near = torch.from_numpy(near)[which]
        return self._near


class BlockScores(nn.Module):
    """Scores each block or item; all scores start near 0, so the first choices are nearly uniform.

    A linear path parallel to the small network learns the important features in fewer
    episodes.
    """

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.net = _mlp(row_width, hidden, last_gain=0.01)
        self.linear = nn.Linear(row_width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, rows: RowParts) -> torch.Tensor:
        """Map rows to scores (B, N)."""
        first, *others = cast(Any, self.net)
        hidden = _of_rows(first, rows)
        for layer in others:
            hidden = layer(hidden)
        return (hidden + _of_rows(self.linear, rows)).squeeze(-1)


class PooledValue(nn.Module):
    """Value of the whole observation, from the mean over rows of a network's features."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.rows = nn.Sequential(_linear(row_width, hidden), nn.ReLU())
        self.value = nn.Sequential(_linear(hidden, hidden), nn.ReLU(), _linear(hidden, 1, gain=1.0))

    def forward(self, rows: RowParts) -> torch.Tensor:
        """Map rows to values (B, 1)."""
        first, activation = cast(Any, self.rows)
        return cast(torch.Tensor, self.value(activation(_of_rows(first, rows)).mean(dim=1)))


class ActorCriticHeads(nn.Module):
    """Replaces the MLP extractor of stable-baselines3; returns logits and value directly."""

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.actor = BlockScores(row_width, hidden)
        self.critic = PooledValue(row_width, hidden)

    def forward(self, rows: RowParts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, N) and values (B, 1)."""
        return self.actor(rows), self.critic(rows)

    def forward_actor(self, rows: RowParts) -> torch.Tensor:
        """Return logits (B, N)."""
        return cast(torch.Tensor, self.actor(rows))

    def forward_critic(self, rows: RowParts) -> torch.Tensor:
        """Return values (B, 1)."""
        return cast(torch.Tensor, self.critic(rows))


class DuelingHeads(nn.Sequential):
    """Q values: the value of the observation plus each action's advantage.

    Dueling networks (Wang et al. 2016, arXiv 1511.06581) without subtracting the mean.
    """

    def __init__(self, row_width: int, hidden: int) -> None:
        super().__init__()
        self.advantage = BlockScores(row_width, hidden)
        self.value = PooledValue(row_width, hidden)

    def forward(self, rows: RowParts) -> torch.Tensor:
        """Map rows to Q values (B, N)."""
        return cast(torch.Tensor, self.value(rows) + self.advantage(rows))


def _of_rows(layer: nn.Linear, rows: RowParts) -> torch.Tensor:
    """Apply a layer to rows, (B, N, H): a sum over their parts, each computed once."""
    own, vectors, shared = torch.split(layer.weight, [p.shape[-1] for p in rows], dim=1)
    of_request = nn.functional.linear(rows.shared, shared).unsqueeze(1)
    of_items = nn.functional.linear(rows.vectors, vectors, layer.bias)
    return nn.functional.linear(rows.own, own) + of_items + of_request


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

"""Exports a checkpoint as the policy file that the runtime loads without torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

from agents.checkpoint import checkpoint_of
from agents.networks import ActorCriticHeads, DuelingHeads, Rows
from agents.trained_policy import fitting_policy
from rap_env.context.base import make_encoder
from rap_env.errors import ArtifactError
from rap_env.policies.network import NetworkWeights
from rap_env.policies.network_policy import PolicyFile
from rap_env.policies.network_rows import Float32s
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


def export_policy(run_dir: str | Path, context: PruningContext) -> PolicyFile:
    """Export the policy of a training for one model.

    Args:
        run_dir: The run's folder; its newest undamaged checkpoint is used.
        context: The model to serve, with the importance of its blocks or items as the agent
            observed it. It may differ from the model of the training if the policy transfers.

    Raises:
        ArtifactError: There is no checkpoint, all are damaged, the policy is not block-wise,
            or it does not transfer to this model.
    """
    checkpoint = checkpoint_of(run_dir)
    config = checkpoint.config
    encoder = make_encoder(context, **checkpoint.observed)
    without = tuple(config.policy_settings["without"])
    weights = network_weights(fitting_policy(checkpoint, encoder), without)
    provenance = {
        "run": Path(run_dir).resolve().name,
        "agent": config.name,
        "seed": config.seed,
        "steps": checkpoint.step,
        "episodes": int(checkpoint.body["progress"].get("episodes", 0)),
        "policy_settings": config.policy_settings,
        "rap_env": __version__,
        "stable_baselines3": metadata.version("stable-baselines3"),
    }
    return PolicyFile.made(weights, encoder, provenance)


def network_weights(policy: BasePolicy, without: tuple[str, ...] = ()) -> NetworkWeights:
    """Return the weights that score actions: of an actor, or of a Q network's advantages.

    Args:
        policy: A block-wise policy.
        without: As in `agents.algorithms.PolicySettings`.

    Raises:
        ArtifactError: The policy is not block-wise.
    """
    heads: object
    rows: object
    if isinstance(policy, DQNPolicy):
        heads, rows = policy.q_net.q_net, policy.q_net.features_extractor
    else:
        actor_critic = cast(ActorCriticPolicy, policy)
        heads, rows = actor_critic.mlp_extractor, actor_critic.pi_features_extractor
    if not isinstance(heads, ActorCriticHeads | DuelingHeads) or not isinstance(rows, Rows):
        raise ArtifactError(
            f"A {type(policy).__name__} with {type(heads).__name__} is not block-wise, and only "
            "block-wise policies can be exported."
        )
    scores = heads.actor if isinstance(heads, ActorCriticHeads) else heads.advantage
    first, second, last = (layer for layer in scores.net if isinstance(layer, nn.Linear))
    vectors = rows.vectors
    return NetworkWeights(
        first_weight=_array(first.weight),
        first_bias=_array(first.bias),
        second_weight=_array(second.weight),
        second_bias=_array(second.bias),
        # Without the bias, which is the same for all actions.
        last_weight=_array(last.weight)[0],
        linear_weight=_array(scores.linear.weight)[0],
        vectors=_array(vectors) if vectors.shape[1] else np.zeros((0, 0), dtype=np.float32),
        rows=rows.spec.key,
        without=without,
    )


def _array(tensor: torch.Tensor) -> Float32s:
    return tensor.detach().cpu().float().numpy().copy()

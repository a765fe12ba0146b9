"""A trained policy on another model: a block-wise network serves any number of layers."""

from __future__ import annotations

from typing import cast

from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from agents.checkpoint import Checkpoint
from rap_env.errors import ArtifactError
from rap_env.observation import ObservationBuilder


def fitting_policy(checkpoint: Checkpoint, builder: ObservationBuilder) -> BasePolicy:
    """The checkpoint's network, made anew for a model with other spaces where that is possible.

    Raises:
        ArtifactError: The policy was trained on a model of another shape and does not transfer.
    """
    policy: BasePolicy = checkpoint.load_model().policy
    space, num_blocks = builder.space, builder.memory.facts.num_blocks
    if policy.observation_space == space:
        return policy
    if checkpoint.config.policy == "blockwise":
        _refuse_vectors(checkpoint, policy, num_blocks)
        arguments = policy._get_constructor_parameters()
        arguments["observation_space"] = space
        arguments["action_space"] = spaces.Discrete(num_blocks)
        other: BasePolicy = type(policy)(**arguments)
        try:
            other.load_state_dict(policy.state_dict())
        except RuntimeError:
            pass  # another set of features
        else:
            return other
    raise ArtifactError(
        f"The policy in {checkpoint.folder} was trained on a model of another shape: it sees "
        f"{policy.observation_space}, but this model gives {space}; train one for this model."
    )


def _refuse_vectors(checkpoint: Checkpoint, policy: BasePolicy, num_blocks: int) -> None:
    """Refuse a policy that knows each block of its own model from a model with another number."""
    trained_on = int(cast(spaces.Discrete, policy.action_space).n)
    if checkpoint.config.policy_settings.get("block_vectors") and trained_on != num_blocks:
        raise ArtifactError(
            f"The policy in {checkpoint.folder} learned a vector for each of {trained_on} blocks, "
            f"but this model has {num_blocks}, so it cannot serve it; train one for this model, or "
            "one with policy_settings.block_vectors=0, which serves both."
        )

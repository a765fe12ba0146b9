"""A trained policy at decision time: a mask for a request, without any score."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy

from agents.baselines.base import MaskChoice, fits
from agents.checkpoint import Checkpoint, latest_checkpoint
from rap_env.blocks import BlockMask
from rap_env.envs.observation import ObservationBuilder
from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.workload import Request

if TYPE_CHECKING:
    from rap_env.importance import ImportanceFeatures


class SeesBlocks(Protocol):
    """The part of `rap_env.workbench.Workbench` that a trained policy needs: no scorer."""

    @property
    def memory(self) -> MemoryModel:
        """Byte arithmetic of the model."""

    @property
    def features(self) -> ImportanceFeatures:
        """What was measured of each block once."""


class TrainedPolicy:
    """Chooses masks with a trained network, whatever agent it was trained with.

    It removes the block that the network likes best, again and again, until the request fits.
    Blocks that are already gone are never considered, also for agents that were trained
    without masks.

    Args:
        policy: The network.
        builder: Makes its observations.
    """

    name = "rap"
    kv_aware = True

    def __init__(self, policy: BasePolicy, builder: ObservationBuilder) -> None:
        self._policy = policy
        self._policy.set_training_mode(False)
        self._builder = builder

    @classmethod
    def load(cls, run_dir: str | Path, workbench: SeesBlocks) -> TrainedPolicy:
        """The policy of the newest whole checkpoint in a run's folder.

        A block-wise policy also serves a model with another number of layers.

        Raises:
            ArtifactError: There is no checkpoint, all are damaged, or the policy was trained
                on a model of another shape.
        """
        checkpoint = latest_checkpoint(Path(run_dir) / "checkpoints")
        if checkpoint is None:
            raise ArtifactError(f"{run_dir} holds no checkpoint; train an agent there first.")
        builder = ObservationBuilder(workbench.memory, workbench.features)
        return cls(_fitting(checkpoint, builder), builder)

    def select(self, request: Request) -> MaskChoice:
        """Choose the blocks to remove for `request`.

        Raises:
            InvalidRequestError: The batch or the length does not suit the model.
            InfeasibleBudgetError: No mask at all fits the budget.
        """
        memory = self._builder.memory
        memory.check(request.batch_size, request.seq_len_tokens)
        memory.check_feasible(request)
        start, mask = time.perf_counter(), BlockMask()
        while not fits(memory, mask, request):
            mask |= BlockMask.of(self._next_block(request, mask))
        return MaskChoice(mask, 0, 0, time.perf_counter() - start)

    @torch.inference_mode()
    def _next_block(self, request: Request, mask: BlockMask) -> int:
        observation = self._builder.build(request, mask)
        tensors, _ = self._policy.obs_to_tensor(observation)
        scores = _scores(self._policy, tensors)[0]
        valid = torch.as_tensor(observation["action_mask"] > 0)
        return int(scores.masked_fill(~valid, -np.inf).argmax())


def _scores(policy: BasePolicy, observation: Any) -> torch.Tensor:
    """What the network thinks of each action, shape (1, 2L): Q values or log-probabilities."""
    if isinstance(policy, DQNPolicy):
        return policy.q_net(observation)  # type: ignore[no-any-return]
    logits: torch.Tensor = policy.get_distribution(observation).distribution.logits  # type: ignore[operator]
    return logits


def _fitting(checkpoint: Checkpoint, builder: ObservationBuilder) -> BasePolicy:
    """The checkpoint's network, made anew for a model with other spaces where that is possible."""
    policy: BasePolicy = checkpoint.load_model().policy
    space, num_blocks = builder.space, builder.memory.facts.num_blocks
    if policy.observation_space == space:
        return policy
    if checkpoint.config.policy == "blockwise":
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

"""What a teacher does with requests, and the states of a policy that does the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from agents.observing import Counts, Flags, MaskObserver, as_tensors
from rap_env.blocks import BlockMask
from rap_env.observation import ObservationBuilder
from rap_env.request import Request
from rap_env.scoring.predictor import feature_matrix

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Demonstration:
    """What a teacher does with a request.

    Attributes:
        request: The request.
        mask: The blocks that it removes.
        episode_return: What an episode that ends with this mask is paid in all, where its last
            step pays everything: minus the loss of the mask (nats per token) with the reward
            ``perplexity``. None if that is not known, or if the reward pays at each step.
    """

    request: Request
    mask: BlockMask
    episode_return: float | None = None


class Batch(NamedTuple):
    """States of a teacher.

    Attributes:
        seen: Their observations.
        right: The blocks that may go next, (B, 2L).
        kept: The blocks that are not removed, (B, 2L).
        returns: What the rest of the episode is paid, NaN where that is not known, (B,).
    """

    seen: dict[str, torch.Tensor]
    right: torch.Tensor
    kept: torch.Tensor
    returns: torch.Tensor


class TeacherStates:
    """Draws states on the way to the teacher's masks: random subsets of them.

    Args:
        shown: What the teacher does; each removes a block at least.
        builder: Makes the observations of the model that is pruned (2L blocks).
        returns: Of each demonstration, NaN where it is not known, (n,).
        gamma: Discount factor: a state's return is so many steps away.
        batch_size: States in a batch, B.
        seed: Seed of the states.

    Raises:
        InvalidRequestError: The pruned model cannot serve a request.
        UnknownNameError: It lacks blocks of a mask.
    """

    def __init__(
        self,
        shown: Sequence[Demonstration],
        builder: ObservationBuilder,
        returns: Floats,
        gamma: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self._observer = MaskObserver(builder, [one.request for one in shown])
        blocks = builder.memory.facts.num_blocks
        self._targets = feature_matrix([one.mask.check(blocks) for one in shown], blocks)
        self._returns = returns
        self._rng = np.random.default_rng(seed)
        self._batch_size = batch_size
        self._gamma = gamma

    def draw(self) -> Batch:
        """So many states, each a random subset of a random mask, smaller than the mask."""
        which = self._rng.integers(len(self._targets), size=self._batch_size)
        target = self._targets[which]
        removed = self._subset(target)
        right = target & ~removed
        remaining = right.sum(axis=1)
        returns = self._returns[which] * self._gamma ** (remaining - 1)
        return Batch(
            seen=as_tensors(self._observer.observe(which, removed)),
            right=torch.from_numpy(right),
            kept=torch.from_numpy(~removed),
            returns=torch.from_numpy(returns.astype(np.float32)),
        )

    def _subset(self, target: Flags) -> Flags:
        """The first n of each row's blocks in a random order, n at random below their number."""
        sizes = target.sum(axis=1)
        wanted: Counts = self._rng.integers(sizes)
        order = np.where(target, self._rng.random(target.shape), np.inf).argsort(axis=1)
        place = order.argsort(axis=1)
        return np.asarray(place < wanted[:, None])

"""PPO whose baseline is the mean return of other episodes of the same request.

Requests differ by orders of magnitude in loss, and a value network has to learn which are hard
before its advantages say which blocks are. Episodes of one request are each other's baseline
without any learning: POMO (Kwon et al. 2020, arXiv 2010.16011, eq. 3) and GRPO (Shao et al.
2024, arXiv 2402.03300). Here the mean leaves the episode itself out, so that it is no part of
its own baseline, and the deviation is that of the mini-batch, as in PPO, not of the group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer

from rap_env.observation import BYTES_OVER

_DECIMALS = 6  # of a request's features; they are shares and logs in [0, 1]

Floats = npt.NDArray[np.float32]


class Episode(NamedTuple):
    """An episode that lies whole in a rollout: steps `first` to `stop` - 1 of lane `lane`."""

    lane: int
    first: int
    stop: int


def whole_episodes(starts: Floats, last_dones: npt.NDArray[Any]) -> Iterator[Episode]:
    """The episodes that begin and end within a rollout of T steps of n lanes.

    Args:
        starts: 1 where an episode begins, (T, n).
        last_dones: Whether the last step ended an episode, (n,).
    """
    steps, lanes = starts.shape
    for lane in range(lanes):
        begins = np.flatnonzero(starts[:, lane]).tolist()
        for first, stop in zip(begins, [*begins[1:], steps], strict=True):
            if stop < steps or last_dones[lane]:
                yield Episode(lane, first, stop)


def group_advantages(
    rewards: Floats, requests: Floats, episodes: Iterator[Episode], gamma: float
) -> dict[Episode, float]:
    """The advantage of each episode whose request occurs more than once.

    Args:
        rewards: Of each step, (T, n).
        requests: The observation's ``request`` at each step, (T, n, R).
        episodes: Those that lie whole in the rollout.
        gamma: Discount factor.

    Returns:
        By episode, its return minus the mean return of the other episodes of the request.
    """
    groups: dict[tuple[float, ...], dict[Episode, float]] = defaultdict(dict)
    for episode in episodes:
        paid = rewards[episode.first : episode.stop, episode.lane].astype(np.float64)
        request = np.delete(requests[episode.first, episode.lane], BYTES_OVER)
        key = tuple(np.round(request.astype(np.float64), _DECIMALS).tolist())
        groups[key][episode] = float(paid @ gamma ** np.arange(len(paid)))
    advantages = {}
    for returns in groups.values():
        total, others = sum(returns.values()), len(returns) - 1
        for episode, own in returns.items():
            if others:
                advantages[episode] = own - (total - own) / others
    return advantages


class GroupBuffer(DictRolloutBuffer):
    """A rollout buffer in which each step of an episode has the episode's group advantage.

    Steps of episodes that the rollout cuts, or whose request occurs once, keep the advantage
    that the value network gives them (GAE). What the value network learns from is unchanged.
    """

    def compute_returns_and_advantage(
        self, last_values: torch.Tensor, dones: npt.NDArray[Any]
    ) -> None:
        """Fill in returns and advantages.

        Args:
            last_values: Values after the last step, (n,).
            dones: Whether the last step ended an episode, (n,).
        """
        super().compute_returns_and_advantage(last_values, dones)
        whole = whole_episodes(self.episode_starts, dones)
        requests = self.observations["request"]
        found = group_advantages(self.rewards, requests, whole, self.gamma)
        for (lane, first, stop), advantage in found.items():
            self.advantages[first:stop, lane] = advantage


class GroupMaskableBuffer(GroupBuffer, MaskableDictRolloutBuffer):  # type: ignore[misc]
    """Rollouts of `GroupMaskablePPO`."""


class GroupPPO(PPO):
    """PPO with group advantages; needs a workload that repeats requests within a rollout."""

    def _setup_model(self) -> None:
        self.rollout_buffer_class = GroupBuffer
        super()._setup_model()


class GroupMaskablePPO(MaskablePPO):  # type: ignore[misc]
    """MaskablePPO with group advantages; needs a workload that repeats requests in a rollout."""

    def _setup_model(self) -> None:
        self.rollout_buffer_class = GroupMaskableBuffer
        super()._setup_model()

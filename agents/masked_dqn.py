"""DQN with action masks."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from stable_baselines3 import DQN
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy

from agents.sb3_policies import MaskedMlpQPolicy

_Observation = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]
_State = tuple[npt.NDArray[Any], ...] | None


class MaskedDQN(DQN):
    """DQN of stable-baselines3 that never chooses a removed block.

    The mask is the observation's ``action_mask``, so the replay buffer also holds that of the
    next state, and the masked Q networks of `agents.sb3_policies` apply it to greedy actions and
    to the maximum in the target. This class restricts random exploration.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        **DQN.policy_aliases,
        "MultiInputPolicy": MaskedMlpQPolicy,
    }

    def predict(
        self,
        observation: _Observation,
        state: _State = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], _State]:
        """Return a greedy action or, at the exploration rate, a random valid one."""
        if deterministic or np.random.rand() >= self.exploration_rate:
            return self.policy.predict(observation, state, episode_start, deterministic)
        actions = _random_valid(observation)
        many = self.policy.is_vectorized_observation(observation)
        return (actions if many else actions[0]), state

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if self.num_timesteps >= learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        actions = _random_valid(self._last_obs)
        return actions, actions


def _random_valid(observation: _Observation) -> npt.NDArray[np.int64]:
    """Return random valid actions, from NumPy's global generator (seeded by SB3)."""
    assert isinstance(observation, dict)
    valid = np.atleast_2d(observation["action_mask"]) > 0.5
    chosen = np.where(valid, np.random.random(valid.shape), -1).argmax(axis=1)
    return np.asarray(chosen, dtype=np.int64)

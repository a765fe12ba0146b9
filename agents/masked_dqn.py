"""DQN that never acts on a block that is already gone."""

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
    """DQN with action masks, the smallest change to stable-baselines3's.

    The mask is the observation's ``action_mask``, so the replay buffer holds the next state's
    mask too, and a masked Q network (`agents.sb3_policies`) makes acting and the target's maximum
    agree. What is left to change is random exploration.
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
        """Greedy or, with the exploration rate as probability, random among valid actions."""
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
    """A random valid action for each observation, from NumPy's global generator (SB3 seeds it)."""
    assert isinstance(observation, dict)
    valid = np.atleast_2d(observation["action_mask"]) > 0.5
    chosen = np.where(valid, np.random.random(valid.shape), -1).argmax(axis=1)
    return np.asarray(chosen, dtype=np.int64)

"""A reward of your own: a wrapper that reads `info`.

    python examples/custom_reward.py

Here an episode pays for bytes that stay free at its end, so that the agent may remove more
than the budget asks for. Two orders of the items are compared under this reward.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"


class FreeBytes(gym.Wrapper):
    """Adds `weight` times the share of the budget that is free at the end of an episode."""

    def __init__(self, env: gym.Env, weight: float = 1.0) -> None:
        super().__init__(env)
        self.weight = weight

    def step(self, action: int) -> tuple:
        """Take an action; only the last reward changes."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            request = info["request"]
            free = 1.0 - info["peak_bytes"] / request["budget_bytes"]
            info["reward_terms"]["free_bytes"] = self.weight * free
            reward += self.weight * free
        return observation, reward, terminated, truncated, info


def first_in_order(observation: dict) -> int:
    """The valid action whose step comes first in the greedy order."""
    place = observation["ladder"][:, 8]
    return int(np.argmin(np.where(observation["action_mask"], place, np.inf)))


def largest(observation: dict) -> int:
    """The valid action that frees most bytes."""
    freed = observation["ladder"][:, 6]
    return int(np.argmax(np.where(observation["action_mask"], freed, -1.0)))


def mean_return(env: gym.Env, act: Callable[[dict], int], episodes: int = 30) -> float:
    """The mean return of a policy on requests of the workload."""
    returns = []
    for number in range(episodes):
        observation, _ = env.reset(seed=number)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


if __name__ == "__main__":
    print(f"rap-env {rap_env.__version__}")
    for name, act in {"greedy order": first_in_order, "largest first": largest}.items():
        plain, paid = (mean_return(env, act) for env in (gym.make(TASK), FreeBytes(gym.make(TASK))))
        print(f"{name:14} return {plain:8.4f}, with free bytes {paid:8.4f}")

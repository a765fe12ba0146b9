"""A workload of your own: requests as your service gets them, in training and in evaluation.

    python examples/custom_workload.py

Built-in workloads draw from traces and ranges (see the argument `workload` of the environment). A
wrapper that sets the request of each episode takes requests from anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from rap_env.policies.loading import load_policy

MODEL = "score_table:smollm2-135m"


def night_and_day(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Few long requests at night, many short ones by day; another process takes memory by day."""
    while True:
        hour = rng.integers(24)
        day = 8 <= hour < 20
        yield {
            "batch_size": int(rng.integers(4, 17)) if day else 1,
            "seq_len_tokens": int(rng.integers(64, 1024)) if day else int(rng.integers(2048, 8192)),
            "budget_fraction": float(rng.uniform(0.5, 0.7) if day else rng.uniform(0.7, 0.9)),
        }


class Requests(gym.Wrapper):
    """Takes the request of each episode from an iterator."""

    def __init__(self, env: gym.Env, workload: Any, seed: int = 0) -> None:
        super().__init__(env)
        self.requests = workload(np.random.default_rng(seed))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Start an episode with the next request."""
        request = {"request": next(self.requests)}
        return self.env.reset(seed=seed, options={**request, **(options or {})})


def mean_loss(env: gym.Env, act: Any, episodes: int = 50) -> float:
    """Mean ΔNLL at the end of an episode, nats per token."""
    losses = []
    for _ in range(episodes):
        observation, info = env.reset()
        over = False
        while not over:
            observation, _, terminated, truncated, info = env.step(act(env, observation))
            over = terminated or truncated
        losses.append(info["loss"])
    return float(np.mean(losses))


def at_random(env: gym.Env, observation: dict) -> int:
    """Any valid action."""
    return int(np.random.choice(np.flatnonzero(observation["action_mask"])))


def in_order(env: gym.Env, observation: dict) -> int:
    """The valid action whose step comes first in the greedy order."""
    place = observation["ladder"][:, 8]
    return int(np.argmin(np.where(observation["action_mask"], place, np.inf)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*out of date.*")
    env = Requests(gym.make("RAPPrune-v1", model=MODEL), night_and_day)
    for name, act in {"at random": at_random, "greedy order": in_order}.items():
        print(f"{name:14} mean ΔNLL {mean_loss(env, act):.4f}")
    policy = load_policy("rap", env.unwrapped.memory)  # answers requests without an environment
    env.reset()
    plan = policy.choose(env.unwrapped.request)
    print(f"The packaged policy for {env.unwrapped.request}: {plan}")

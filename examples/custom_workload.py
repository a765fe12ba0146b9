"""A workload of your own: requests as your service gets them, in training and in evaluation.

    python examples/custom_workload.py

Built-in workloads draw from traces and ranges (see the argument `workload` of the
environment). A wrapper that sets the request of each episode takes requests from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

import rap_env

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


def mean_loss(env: gym.Env, policy: Any, episodes: int = 50) -> float:
    """Mean ΔNLL of the plans of a policy for the next requests, nats per token."""
    losses = []
    for _ in range(episodes):
        env.reset()
        plan = policy.choose(env.unwrapped.request)
        scorer = env.unwrapped.context.scorer
        losses.append(scorer.nll(plan) - scorer.native_nll)
    return float(np.mean(losses))


if __name__ == "__main__":
    for name in ("rap", "knapsack"):  # packaged policies
        env = Requests(gym.make("RAPLadder-v0", model=MODEL), night_and_day)
        policy = rap_env.load_policy(name, env.unwrapped.memory)
        print(f"{name:10} mean ΔNLL {mean_loss(env, policy):.4f} nats/token")
    print(f"The last request, {env.unwrapped.request}, gets {policy.choose(env.unwrapped.request)}")

"""Masked PPO over 44 tiny models, judged on four that it never saw; each episode runs a model.

    PYTHONPATH=. python examples/across_models.py [ROLLOUTS]

Attention between items sees which others were lowered. Each rollout plays eight plans of two
requests of every model; a plan is compared with the other seven, so there is no critic. The
network starts from the best of a few noisy orders, which it imitates. Five minutes on one core
with 40 rollouts, after the models were prepared at the first start.
"""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import torch

import rap_env
from agents.unseen import (
    Acting,
    Bench,
    NoisyOrders,
    SetNetwork,
    fit,
    imitation_loss,
    improve,
    teacher_states,
    variant,
)

TRAIN, JUDGED_ON = "RAPLadder/Unseen-Train-v1", "RAPLadder/Unseen-Tune-v1"
ROLLOUTS, UPDATES, NOISY = 40, 1_500, 8


def train(rollouts: int = ROLLOUTS, updates: int = UPDATES, seed: int = 0) -> SetNetwork:
    """Imitate searched plans of the training models, then learn from plans that run."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    across = gym.make(TRAIN, every_level=True, disable_env_checker=True).unwrapped
    space = across.observation_space
    network = SetNetwork(space["ladder"].shape[1], space["request"].shape[0])
    models = [Bench.of(env) for env in across.envs]
    for bench in models:
        bench.search(np.random.default_rng(seed), noisy=NOISY, rounds=0, offspring=0)
    states = teacher_states(models, ways=4, most=1, seed=seed)
    fit(network, states, imitation_loss, updates, batch_size=128, seed=seed)
    improve(network, models, rollouts, learning_rate=1e-3, seed=seed)
    return network


if __name__ == "__main__":
    network = train(int(sys.argv[1])) if sys.argv[1:] else train()
    policy = variant(Acting, network=network)
    for runs in (0, 8):
        for name, method in {"policy": policy, "noisy orders": NoisyOrders}.items():
            print(rap_env.evaluate(method, JUDGED_ON, "test", name=name, runs=runs), end="\n\n")

"""PPO over 44 tiny models, judged on four that it never saw; each episode runs a model.

    PYTHONPATH=. python examples/across_models.py [SEED ...]

One small network scores every item, from shares and costs that mean the same in each model,
so the policy serves ladders of any size. It starts as the order by cost per useful byte, which
is right for no model and nearly right for all: what is learned is how to depart from it. The
reward is the log of the ΔNLL relative to that of the greedy order for the same request, which
makes hard and easy requests count alike.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO

import rap_env
from agents.networks import MaskableBlockwisePolicy
from agents.vector_env import GymVecEnv
from rap_env.policies.network_rows import ITEM_ROWS

TASK, JUDGED_ON = "RAPLadder/Unseen-Train-v1", "RAPLadder/Unseen-Tune-v1"
REWARD = {"name": "perplexity", "scale": "log", "relative_to": "one_shot"}
ENVS, STEPS = 88, 98_560
PRICE_WEIGHT = 3.0
"""How much a price of one spread above the mean lowers an item's score before training."""
SETTINGS: dict[str, Any] = {
    "policy_kwargs": {"hidden": 32},
    "n_steps": 32,
    "batch_size": 128,
    "n_epochs": 8,
    "gamma": 1.0,  # an episode is paid at its end
    "learning_rate": lambda left: 1e-3 * left,
    "gae_lambda": 0.98,
    "ent_coef": 0.005,
    "target_kl": 0.05,
}


def make_envs() -> GymVecEnv:
    """The task with another reward; a policy is judged by the reward of the task."""
    given = {"reward": REWARD, "info": "arrays", "autoreset_mode": "SameStep"}
    return GymVecEnv(gym.make_vec(TASK, num_envs=ENVS, **given))


def train(seed: int, steps: int = STEPS) -> MaskablePPO:
    """Train an agent, or make an untrained one with 0 steps."""
    torch.set_num_threads(1)
    model = MaskablePPO(MaskableBlockwisePolicy, make_envs(), seed=seed, **SETTINGS)
    compared = ITEM_ROWS.columns()["compared"]
    with torch.no_grad():  # the last of the compared columns is the price of the next level
        model.policy.mlp_extractor.actor.linear.weight[0, compared.stop - 1] = -PRICE_WEIGHT
    return model.learn(steps) if steps else model


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or ["0"]):
        agent = train(seed)
        print(rap_env.evaluate(agent, JUDGED_ON, "test", name=f"PPO, seed {seed}"), end="\n\n")

"""PPO over four tiny models, judged on two that it never saw; each episode runs a model.

    PYTHONPATH=. python examples/across_models.py [SEED ...]

One small network scores every item, from shares and costs that mean the same in each model,
so the policy serves ladders of any size. It starts as the order by cost per useful byte, which
is right for no model and nearly right for all: what is learned is how to depart from it. The
reward is the log of the ΔNLL relative to that of the greedy order for the same request, which
makes hard and easy requests count alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import DummyVecEnv

import rap_env
from agents.networks import MaskableBlockwisePolicy
from rap_env.policies.network_rows import ITEM_ROWS

TASK = "RAPLadder/TinyAcross-v0"
JUDGED_ON = ("RAPLadder/TinyGrouped-v0", "RAPLadder/TinyEven-v0")
REWARD = {"name": "perplexity", "scale": "log", "relative_to": "one_shot"}
ENVS, STEPS = 16, 49_152
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


def make_env() -> gym.Env:
    """The task with another reward; a policy is judged by the reward of the task."""
    return gym.make(TASK, reward=REWARD, store=None, info="arrays", disable_env_checker=True)


def train(seed: int, steps: int = STEPS) -> MaskablePPO:
    """Train an agent, or make an untrained one with 0 steps."""
    torch.set_num_threads(1)
    envs = DummyVecEnv([make_env] * ENVS)
    model = MaskablePPO(MaskableBlockwisePolicy, envs, seed=seed, **SETTINGS)
    compared = ITEM_ROWS.columns()["compared"]
    with torch.no_grad():  # the last of the compared columns is the price of the next level
        model.policy.mlp_extractor.actor.linear.weight[0, compared.stop - 1] = -PRICE_WEIGHT
    return model.learn(steps) if steps else model


def acting(model: MaskablePPO) -> Callable[[dict], int]:
    """What a trained agent does in an environment of any one model."""
    padded = gym.make(TASK, disable_env_checker=True).unwrapped.padded

    def act(observation: dict) -> int:
        seen = padded(observation)
        masks = seen["action_mask"].astype(bool)
        return int(model.predict(seen, deterministic=True, action_masks=masks)[0])

    return act


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or ["0"]):
        policy = acting(train(seed))
        for task in JUDGED_ON:
            print(rap_env.evaluate(policy, task, "test", name=f"PPO, seed {seed}"), end="\n\n")

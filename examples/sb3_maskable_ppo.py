"""MaskablePPO of stable-baselines3 on the score table of the default model, without our agents.

    python examples/sb3_maskable_ppo.py

`MultiInputPolicy` takes the dictionary of arrays as it is. The environment has `action_masks`,
which MaskablePPO asks each sub-environment for.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import DummyVecEnv

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v0"
REWARD = {"name": "perplexity", "scale": "log"}  # ΔNLL differs by orders of magnitude
ENVS, STEPS = 16, 16_384


def make_env() -> gym.Env:
    """The pinned task with another reward; the evaluation has the reward of the task."""
    return gym.make(TASK, reward=REWARD, disable_env_checker=True)


def train(
    steps: int = STEPS,
    seed: int = 0,
    watch: Callable[[int, MaskablePPO], object] = lambda steps, model: None,
) -> MaskablePPO:
    """Train an agent, or make an untrained one with 0 steps.

    `watch` is called after each step of all environments with the number of steps so far.
    """
    torch.set_num_threads(1)
    model = MaskablePPO(
        "MultiInputPolicy",
        DummyVecEnv([make_env] * ENVS),
        n_steps=64,
        batch_size=256,
        n_epochs=6,
        gamma=1.0,
        learning_rate=1e-3,
        ent_coef=0.002,
        seed=seed,
    )
    if not steps:
        return model
    return model.learn(steps, callback=lambda *_: watch(model.num_timesteps, model) is not False)


if __name__ == "__main__":
    print(rap_env.evaluate(train(0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="MaskablePPO"))

"""MaskablePPO of stable-baselines3 on the score table of the default model, without our agents.

    python examples/sb3_maskable_ppo.py

`MultiInputPolicy` takes the dictionary of arrays as it is. The environment has
`action_masks`, which MaskablePPO asks each sub-environment for. What `SETTINGS` and
`Changing` change decides: with the defaults of MaskablePPO, as many seconds end far behind
the knapsack.
"""

from __future__ import annotations

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"
REWARD = {"name": "perplexity", "scale": "log"}  # ΔNLL differs by orders of magnitude
ENVS, STEPS = 64, 600_000


class Changing(BaseFeaturesExtractor):
    """The request, the mask, and what changes of each item: its level and the bytes of the next."""

    def __init__(self, space: gym.spaces.Dict) -> None:
        items, request = space["action_mask"].shape[0], space["request"].shape[0]
        super().__init__(space, features_dim=request + 3 * items)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """All in one row for each observation."""
        rows = observation["ladder"][:, :, 5:7].flatten(1)
        return torch.cat([observation["request"], observation["action_mask"], rows], dim=1)


SETTINGS = {
    "policy_kwargs": {"features_extractor_class": Changing},
    "n_steps": 32,
    "batch_size": 512,
    "n_epochs": 4,
    "gamma": 1.0,  # an episode is paid at its end
    "learning_rate": lambda left: 2e-3 * left,
    "ent_coef": 0.002,
}


def make_env() -> gym.Env:
    """The pinned task with another reward; the evaluation has the reward of the task."""
    return gym.make(TASK, reward=REWARD, info="arrays", disable_env_checker=True)


def train(steps: int = STEPS, seed: int = 0) -> MaskablePPO:
    """Train an agent, or make an untrained one with 0 steps."""
    torch.set_num_threads(1)
    envs = DummyVecEnv([make_env] * ENVS)
    model = MaskablePPO("MultiInputPolicy", envs, seed=seed, **SETTINGS)
    if not steps:
        return model
    return model.learn(steps)


if __name__ == "__main__":
    print(rap_env.evaluate(train(0), TASK, "test", name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, "test", name="MaskablePPO"))

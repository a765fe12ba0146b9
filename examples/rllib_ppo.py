"""Masked PPO with RLlib on the score table of the default model: a minute or two on one core.

    pip install rap-env "ray[rllib]"      # in an environment of its own: RLlib pins gymnasium
    python examples/rllib_ppo.py

An RLModule gets the dictionary of arrays as it is; its forward passes mask the logits, so that
exploration, inference and the loss see the same distribution.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune.registry import register_env
from torch import nn

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"
ENVS, STEPS, ITERATIONS = 16, 1024, 40
HIDDEN, LEARNING_RATE = 32, 2e-3
LOWEST = -1e9  # a finite logit: RLlib multiplies probabilities and logits, and 0 * inf is NaN


class MaskedModule(TorchRLModule, ValueFunctionAPI):
    """Scores each item from its row, the request, and the mean over all items."""

    def setup(self) -> None:
        """Make the networks."""
        space = self.observation_space
        width = space["ladder"].shape[1] + space["request"].shape[0]
        self.row = nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh())
        self.score = nn.Sequential(nn.Linear(2 * HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.value = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def rows(self, seen: dict) -> torch.Tensor:
        """A hidden row for each item (B, N, H)."""
        ladder, request = seen["ladder"].float(), seen["request"].float()
        request = request[:, None].expand(-1, ladder.shape[1], -1)
        return self.row(torch.cat([ladder, request], dim=-1))

    def _forward(self, batch: dict, **kwargs: Any) -> dict:
        rows = self.rows(batch[Columns.OBS])
        mean = rows.mean(dim=1, keepdim=True).expand_as(rows)
        logits = self.score(torch.cat([rows, mean], dim=-1))[..., 0]
        invalid = batch[Columns.OBS]["action_mask"] == 0
        return {Columns.ACTION_DIST_INPUTS: logits.masked_fill(invalid, LOWEST)}

    def compute_values(self, batch: dict, embeddings: Any = None) -> torch.Tensor:
        """The value of each observation (B,)."""
        return self.value(self.rows(batch[Columns.OBS]).mean(dim=1))[:, 0]

    def predict(self, observation: dict, deterministic: bool = True) -> tuple[int, None]:
        """The most likely action for one observation, as `rap_env.evaluate` asks for it."""
        seen = {key: torch.as_tensor(value)[None] for key, value in observation.items()}
        with torch.no_grad():
            logits = self._forward({Columns.OBS: seen})[Columns.ACTION_DIST_INPUTS]
        return int(logits[0].argmax()), None


def make_env(settings: dict) -> gym.Env:
    """The pinned task; its rewards are on a log scale, because ΔNLL differs by orders of size."""
    import rap_env  # noqa: F401 - registers the task in the process that steps it

    return gym.make(TASK, reward={"name": "perplexity", "scale": "log"}, disable_env_checker=True)


def train(iterations: int = ITERATIONS, seed: int = 0) -> MaskedModule:
    """Train an agent in this process, without remote workers."""
    register_env("rap", make_env)
    config = (
        PPOConfig()
        .environment("rap")
        .framework("torch")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=ENVS)
        .learners(num_learners=0)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=MaskedModule))
        .training(
            train_batch_size=STEPS,
            minibatch_size=256,
            num_epochs=4,
            gamma=1.0,
            lambda_=0.95,
            clip_param=0.2,
            entropy_coeff=0.002,
            vf_clip_param=float("inf"),
            use_kl_loss=False,
            grad_clip=0.5,
            lr=[[0, LEARNING_RATE], [max(iterations, 1) * STEPS, 0.0]],
        )
        .debugging(seed=seed)
    )
    algorithm = config.build_algo()
    for iteration in range(iterations):
        found = algorithm.train()["env_runners"]
        if iteration % 10 == 9:
            mean = found["episode_return_mean"]
            print(f"iteration {iteration + 1}: mean return {mean:.4f}", file=sys.stderr)
    module = algorithm.get_module()
    algorithm.stop()
    return module


if __name__ == "__main__":
    print(rap_env.evaluate(train(0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="PPO of RLlib"))

"""Masked PPO with TorchRL on the score table of the default model: under a minute on one core.

    pip install torchrl
    python examples/torchrl_ppo.py

TorchRL resets sub-environments itself, so the vector environment must not (autoreset mode
DISABLED). `MaskedCategorical` reads the mask from a key of the observation, as bool.
"""

from __future__ import annotations

import sys

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"
ENVS, STEPS, UPDATES, EPOCHS, MINIBATCHES = 32, 32, 40, 4, 4
HIDDEN, LEARNING_RATE = 32, 2e-3
KEYS = ["ladder", "request", "action_mask"]


class Rows(nn.Module):
    """Hidden rows of the items (B, N, H) and their mean (B, H), from their rows and the request."""

    def __init__(self, columns: int, request: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(columns + request, HIDDEN), nn.Tanh())

    def forward(self, ladder: torch.Tensor, request: torch.Tensor) -> tuple:
        """Hidden rows, each with the mean of all, and the mean."""
        request = request.unsqueeze(-2).expand(*ladder.shape[:-1], -1)
        rows = self.net(torch.cat([ladder, request], dim=-1))
        mean = rows.mean(dim=-2)
        return torch.cat([rows, mean.unsqueeze(-2).expand_as(rows)], dim=-1), mean


class Scores(nn.Sequential):
    """The logit of each item (B, N)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2 * HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """One number for each item."""
        return super().forward(rows).squeeze(-1)


class Agent:
    """Actor and critic over one network of rows."""

    def __init__(self, columns: int, request: int) -> None:
        rows = TensorDictModule(Rows(columns, request), ["ladder", "request"], ["rows", "mean"])
        logits = TensorDictModule(Scores(), ["rows"], ["logits"])
        value = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        # Int8 otherwise.
        mask = TensorDictModule(torch.Tensor.bool, ["action_mask"], ["valid"])
        self.actor = ProbabilisticActor(
            TensorDictSequential(rows, logits, mask),
            in_keys={"logits": "logits", "mask": "valid"},
            distribution_class=MaskedCategorical,
            return_log_prob=True,
        )
        self.critic = TensorDictSequential(rows, ValueOperator(value, ["mean"]))

    def predict(self, observation: dict, deterministic: bool = True) -> tuple[int, None]:
        """The most likely action for one observation, as `rap_env.evaluate` asks for it."""
        seen = TensorDict({key: torch.as_tensor(observation[key])[None] for key in KEYS}, [1])
        with torch.no_grad():
            return int(self.actor.get_dist(seen).logits[0].argmax()), None


def train(updates: int = UPDATES, seed: int = 0) -> Agent:
    """Train an agent; its rewards are on a log scale, because ΔNLL differs by orders of size."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    reward = {"name": "perplexity", "scale": "log"}
    envs = gym.make_vec(TASK, num_envs=ENVS, reward=reward, autoreset_mode=AutoresetMode.DISABLED)
    space = envs.single_observation_space
    agent = Agent(space["ladder"].shape[1], space["request"].shape[0])
    if not updates:
        return agent
    env = GymWrapper(envs, categorical_action_encoding=True)
    env.set_seed(seed)
    batch = ENVS * STEPS
    collector = Collector(
        env,
        agent.actor,
        frames_per_batch=batch,
        total_frames=updates * batch,
        auto_register_policy_transforms=False,
    )
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=agent.critic)
    loss = ClipPPOLoss(
        agent.actor, agent.critic, clip_epsilon=0.2, entropy_coeff=0.002, critic_coeff=0.5,
        loss_critic_type="l2", normalize_advantage=True,
    )  # fmt: skip
    optimiser = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, eps=1e-5)
    for update, rollout in enumerate(collector):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        with torch.no_grad():
            advantage(rollout)
        flat = rollout.reshape(-1)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(flat)).chunk(MINIBATCHES):
                losses = loss(flat[part])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                optimiser.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimiser.step()
        if update % 10 == 9:
            paid = rollout["next", "reward"].mean()
            print(f"update {update + 1}: mean reward of a step {paid:.4f}", file=sys.stderr)
    collector.shutdown()
    return agent


if __name__ == "__main__":
    print(rap_env.evaluate(train(0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="PPO of TorchRL"))

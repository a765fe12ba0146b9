"""Masked PPO in one file, on the score table of the default model: a minute on one core.

    python examples/ppo_single_file.py

The networks see what changes: the level of each item, and the bytes that its next level
frees. Where an episode has ended, the vector environment already shows the next one
(SAME_STEP).
"""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"
ENVS, STEPS, UPDATES, EPOCHS, BATCH = 64, 32, 400, 4, 512
GAMMA, LAMBDA, CLIP, ENTROPY, LEARNING_RATE = 1.0, 0.95, 0.2, 0.002, 2e-3
# Columns of an item's row: its level, and the bytes that the next one frees.
CHANGING = [5, 6]


def network(inputs: int, outputs: int, gain: float, hidden: int = 64) -> nn.Sequential:
    """Two hidden layers; with a small gain, all outputs begin near 0."""
    layers: list[nn.Module] = []
    widths, gains = (inputs, hidden, hidden, outputs), (2**0.5, 2**0.5, gain)
    for width, out, scale in zip(widths[:-1], widths[1:], gains, strict=True):
        linear = nn.Linear(width, out)
        nn.init.orthogonal_(linear.weight, scale)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """A policy and a value, each with a network of its own."""

    def __init__(self, request: int, items: int) -> None:
        super().__init__()
        inputs = request + items * (len(CHANGING) + 1)
        self.scores, self.value = network(inputs, items, 0.01), network(inputs, 1, 1.0)

    def forward(self, seen: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """The distribution over items and the value, for what `flat` returns."""
        scores = self.scores(seen)
        scores = scores.masked_fill(seen[:, : scores.shape[1]] == 0, -torch.inf)
        return Categorical(logits=scores, validate_args=False), self.value(seen)[:, 0]

    def predict(self, observation: dict, deterministic: bool = True) -> tuple[int, None]:
        """The most likely action for one observation, as `rap_env.evaluate` asks for it."""
        with torch.no_grad():
            distribution, _ = self(flat({key: array[None] for key, array in observation.items()}))
        return int(distribution.logits[0].argmax()), None


def flat(observation: dict) -> torch.Tensor:
    """The mask, the request and what changes of all items, (n, inputs)."""
    rows = observation["ladder"][:, :, CHANGING]
    parts = observation["action_mask"], observation["request"], rows.reshape(len(rows), -1)
    return torch.as_tensor(np.concatenate(parts, axis=1, dtype=np.float32))


def advantages(rewards: torch.Tensor, values: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), (steps, envs)."""
    estimates, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for step in reversed(range(len(rewards))):
        goes_on = 1.0 - over[step]
        delta = rewards[step] + GAMMA * values[step + 1] * goes_on - values[step]
        last = delta + GAMMA * LAMBDA * goes_on * last
        estimates[step] = last
    return estimates


def train(updates: int = UPDATES, seed: int = 0) -> Agent:
    """Train an agent; its rewards are on a log scale, because ΔNLL differs by orders of size."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    reward = {"name": "perplexity", "scale": "log"}
    envs = gym.make_vec(TASK, num_envs=ENVS, reward=reward, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = Agent(envs.single_observation_space["request"].shape[0], envs.single_action_space.n)
    optimiser = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    observation = flat(envs.reset(seed=seed)[0])
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        seen, actions, log_probs, values, rewards, over = [], [], [], [], [], []
        for _ in range(STEPS):
            with torch.no_grad():
                distribution, value = agent(observation)
                action = distribution.sample()
            seen.append(observation)
            actions.append(action)
            log_probs.append(distribution.log_prob(action))
            values.append(value)
            arrays, reward, terminated, truncated, _ = envs.step(action.numpy())
            observation = flat(arrays)
            rewards.append(torch.as_tensor(reward, dtype=torch.float32))
            over.append(torch.as_tensor(terminated | truncated, dtype=torch.float32))
        with torch.no_grad():
            values.append(agent(observation)[1])
        advantage = advantages(torch.stack(rewards), torch.stack(values), torch.stack(over))
        returns = (advantage + torch.stack(values[:-1])).flatten()
        advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()
        batch, action, old = torch.cat(seen), torch.cat(actions), torch.cat(log_probs)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(action)).split(BATCH):
                distribution, value = agent(batch[part])
                ratio = (distribution.log_prob(action[part]) - old[part]).exp()
                clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * advantage[part], clipped * advantage[part]).mean()
                loss += 0.5 * (value - returns[part]).pow(2).mean()
                loss -= ENTROPY * distribution.entropy().mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimiser.step()
        if update % 50 == 49:
            mean = torch.stack(rewards).sum() / torch.stack(over).sum()
            print(f"update {update + 1}: mean return {mean:.3f}", file=sys.stderr)
    envs.close()
    return agent


if __name__ == "__main__":
    print(rap_env.evaluate(train(updates=0), TASK, "test", name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, "test", name="PPO in one file"))

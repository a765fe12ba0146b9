"""Masked PPO in one file, on the score table of the default model: half a minute on one core.

    python examples/ppo_single_file.py

The network sees each item of the ladder in the same way, so that it has few weights. Invalid
actions get a logit of minus infinity. Where an episode has ended, the vector environment already
shows the next one (autoreset mode SAME_STEP), so that no step is a dummy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v0"
ENVS, STEPS, UPDATES, EPOCHS, MINIBATCHES = 32, 32, 40, 4, 4
GAMMA, LAMBDA, CLIP, ENTROPY, LEARNING_RATE = 1.0, 0.95, 0.2, 0.002, 2e-3


class Agent(nn.Module):
    """Scores each item from its row, the request, and the mean over all items."""

    def __init__(self, request: int, columns: int, hidden: int = 32) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Linear(request + columns, hidden), nn.Tanh())
        self.score = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, observation: dict) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        """The distribution over items and the value, for a batch of observations."""
        rows, request = observation["ladder"], observation["request"]
        request = request[:, None].expand(-1, rows.shape[1], -1)
        rows = self.row(torch.cat([rows, request], dim=-1))
        mean = rows.mean(dim=1)
        scores = self.score(torch.cat([rows, mean[:, None].expand_as(rows)], dim=-1))[..., 0]
        scores = scores.masked_fill(observation["action_mask"] == 0, -torch.inf)
        return torch.distributions.Categorical(logits=scores), self.value(mean)[:, 0]

    def predict(self, observation: dict, deterministic: bool = True) -> tuple[int, None]:
        """The most likely action for one observation, as `rap_env.evaluate` asks for it."""
        with torch.no_grad():
            distribution, _ = self(tensors({k: v[None] for k, v in observation.items()}))
        return int(distribution.probs[0].argmax()), None


def tensors(observation: dict) -> dict:
    """The arrays of an observation as tensors."""
    return {name: torch.as_tensor(array) for name, array in observation.items()}


def advantages(rewards: torch.Tensor, values: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), (steps, envs)."""
    found, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for step in reversed(range(len(rewards))):
        goes_on = 1.0 - over[step]
        delta = rewards[step] + GAMMA * values[step + 1] * goes_on - values[step]
        last = delta + GAMMA * LAMBDA * goes_on * last
        found[step] = last
    return found


def train(
    updates: int = UPDATES,
    seed: int = 0,
    reward: dict | None = None,
    watch: Callable[[int, Agent], object] = lambda steps, agent: None,
) -> Agent:
    """Train an agent; its rewards are on a log scale, because ΔNLL differs by orders of size.

    `watch` is called after each update with the number of steps so far.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    reward = reward or {"name": "perplexity", "scale": "log"}
    envs = gym.make_vec(TASK, num_envs=ENVS, reward=reward, autoreset_mode=AutoresetMode.SAME_STEP)
    columns = envs.single_observation_space["ladder"].shape[1]
    agent = Agent(envs.single_observation_space["request"].shape[0], columns)
    optimiser = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    observation = tensors(envs.reset(seed=seed)[0])
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        kept, actions, log_probs, values, rewards, over = [], [], [], [], [], []
        for _ in range(STEPS):
            with torch.no_grad():
                distribution, value = agent(observation)
            action = distribution.sample()
            kept.append(observation)
            actions.append(action)
            log_probs.append(distribution.log_prob(action))
            values.append(value)
            new, paid, terminated, truncated, _ = envs.step(action.numpy())
            observation = tensors(new)
            rewards.append(torch.as_tensor(paid, dtype=torch.float32))
            over.append(torch.as_tensor(terminated | truncated, dtype=torch.float32))
        with torch.no_grad():
            values.append(agent(observation)[1])
        value, paid = torch.stack(values), torch.stack(rewards)
        advantage = advantages(paid, value, torch.stack(over))
        returns = (advantage + value[:-1]).flatten()
        batch = {name: torch.cat([one[name] for one in kept]) for name in observation}
        action, old = torch.cat(actions), torch.cat(log_probs)
        advantage = advantage.flatten()
        for _ in range(EPOCHS):
            for part in torch.randperm(len(action)).chunk(MINIBATCHES):
                distribution, value = agent({name: array[part] for name, array in batch.items()})
                ratio = (distribution.log_prob(action[part]) - old[part]).exp()
                scaled = advantage[part]
                scaled = (scaled - scaled.mean()) / (scaled.std() + 1e-8)
                clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * scaled, clipped * scaled).mean()
                loss += 0.5 * (value - returns[part]).pow(2).mean()
                loss -= ENTROPY * distribution.entropy().mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimiser.step()
        watch((update + 1) * ENVS * STEPS, agent)
        if update % 10 == 9:
            print(f"update {update + 1}: mean reward of a step {paid.mean():.4f}", file=sys.stderr)
    envs.close()
    return agent


if __name__ == "__main__":
    print(rap_env.evaluate(train(updates=0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="PPO in one file"))

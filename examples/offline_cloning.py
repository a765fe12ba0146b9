"""Behaviour cloning from a Minari dataset of a pinned task, without a single step of it.

    pip install "minari[hdf5]"
    PYTHONPATH=. python examples/offline_episodes.py   # writes the dataset
    python examples/offline_cloning.py

The network is that of `ppo_single_file.py`, and learns to repeat the actions of the episodes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import minari
import numpy as np
import torch

import rap_env

DATASET = "rapladder/smollm2-table/mixed-v0"
UPDATES, BATCH, LEARNING_RATE = 600, 256, 3e-3

_SPEC = importlib.util.spec_from_file_location(
    "ppo", Path(__file__).with_name("ppo_single_file.py")
)
_PPO = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_PPO)
TASK = _PPO.TASK


def transitions(dataset: str) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """All observations in which an action was taken, and the actions."""
    episodes = list(minari.load_dataset(dataset).iterate_episodes())
    names = episodes[0].observations
    seen = {
        name: np.concatenate([one.observations[name][:-1] for one in episodes]) for name in names
    }
    return seen, torch.as_tensor(np.concatenate([one.actions for one in episodes]))


def train(dataset: str = DATASET, updates: int = UPDATES, seed: int = 0) -> torch.nn.Module:
    """An agent that was trained to repeat the actions of a dataset."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    seen, actions = transitions(dataset)
    agent = _PPO.Agent(seen["request"].shape[1], seen["action_mask"].shape[1])
    inputs = _PPO.flat(seen)
    optimiser = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE)
    for _ in range(updates):
        part = torch.randint(len(actions), (BATCH,))
        distribution, _ = agent(inputs[part])
        loss = -distribution.log_prob(actions[part]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return agent


if __name__ == "__main__":
    print(rap_env.evaluate(train(updates=0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="behaviour cloning"))

"""Offline learning: episodes of a pinned task as a Minari dataset, and behaviour cloning from it.

    pip install "minari[hdf5]"
    PYTHONPATH=. python examples/offline_learning.py   # in a checkout, for `agents`

The best measured plans and the packaged policy take turns. A plan is reached by random steps
towards it, so that one plan gives many episodes. The network is that of `ppo_single_file.py`,
and learns to repeat the actions of the episodes without a single step of the task.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

import rap_env
from agents.trained_policy import PlanObserver
from examples.ppo_single_file import TASK, Agent, flat

DATASET = "rapladder/smollm2-table/mixed-v0"
UPDATES, BATCH, LEARNING_RATE = 600, 256, 3e-3

Choose = Callable[[rap_env.Request], rap_env.Plan]


def play(env: gym.Env, choose: Choose, rng: np.random.Generator, seed: int) -> EpisodeBuffer:
    """Play one episode by random steps towards the plan that `choose` returns for its request."""
    task, first = env.unwrapped, np.array([0])
    observation, _ = env.reset(seed=seed)
    observer = PlanObserver(task.encoder, [task.request])
    target = np.array([task.ladder.positions(choose(task.request))])
    seen, actions, rewards, ends = [observation], [], [], (False, False)
    while not any(ends):
        valid = observation["action_mask"].astype(bool)
        positions = np.array([task.ladder.positions(task.plan)])
        right = observer.right_actions(first, positions, target)[0] & valid
        actions.append(int(rng.choice(np.flatnonzero(right if right.any() else valid))))
        observation, reward, *ends, _ = env.step(actions[-1])
        seen.append(observation)
        rewards.append(reward)
    goes_on = [False] * (len(actions) - 1)
    return EpisodeBuffer(
        seed=seed,
        observations={name: np.stack([step[name] for step in seen]) for name in observation},
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.array([*goes_on, ends[0]]),
        truncations=np.array([*goes_on, ends[1]]),
    )


def write(dataset: str = DATASET, episodes: int = 400) -> minari.MinariDataset:
    """Write the dataset, and return it."""
    env = gym.make(TASK, disable_env_checker=True)
    task, rng = env.unwrapped, np.random.default_rng(0)
    choosers = [task.context.best_measured, rap_env.load_policy("rap", task.memory).choose]
    played = [play(env, choosers[n % 2], rng, seed=n) for n in range(episodes)]
    return minari.create_dataset_from_buffers(
        dataset, played, env=env.spec, algorithm_name="frontier+policy"
    )


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
    agent = Agent(seen["request"].shape[1], seen["action_mask"].shape[1])
    inputs = flat(seen)
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
    if DATASET not in minari.list_local_datasets():
        print(write().total_steps, "steps are in the dataset", DATASET)
    print(rap_env.evaluate(train(updates=0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="behaviour cloning"))

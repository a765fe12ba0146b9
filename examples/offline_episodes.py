"""Episodes of a pinned task as a Minari dataset, for the offline examples.

    pip install "minari[hdf5]"
    PYTHONPATH=. python examples/offline_episodes.py   # in a checkout, for `agents`

The best measured plans and the packaged policy take turns. A plan is reached by random steps
towards it, so that one plan gives many episodes.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

import rap_env
from agents.trained_policy import PlanObserver

TASK = "RAPLadder/SmolLM2-Table-v1"
DATASET = "rapladder/smollm2-table/mixed-v0"

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


if __name__ == "__main__":
    print(write().total_steps, "steps are in the dataset", DATASET)

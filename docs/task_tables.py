"""Tables of tasks: spaces and speed, lengths of episodes, and the best published method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
from record_tables import unseen

from benchmarks.measuring import committed_records
from benchmarks.step import TASKS as STEP_TASKS
from experiments.study.table_format import markdown
from experiments.unseen import POLICY
from rap_env.leaderboard.entries import UNCHOSEN, published_entries
from rap_env.leaderboard.tasks import pinned_task, pinned_tasks

_EPISODES = 40  # with random actions, for the lengths of episodes

MASK = "action_mask"

UNSEEN = "RAPLadder/Unseen-Tune-v1"

README_TASKS = (
    UNSEEN,
    "RAPLadder/SmolLM2-Table-v2",
    "RAPLadder/SmolLM2-LowBits-Table-v0",
    "RAPLadder/Gemma3-270M-Table-v1",
    STEP_TASKS[0],
)

LISTED_TASKS = [name for name in pinned_tasks() if "-Table-" in name or "Tiny" in name]


def random_steps(env: gym.Env[Any, Any], seed: int) -> int:
    """The steps of an episode with random actions."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps, ended = 0, [False]
    while not any(ended):
        action = env.action_space.sample(observation[MASK])
        observation, _, *ended, _ = env.step(action)
        steps += 1
    return steps


@cache
def task_row(name: str) -> list[str]:
    """A pinned task: its spaces, speed, and the least ΔNLL of a published method."""
    (speeds,) = (r.measured["steps_per_s"] for r in committed_records() if r.benchmark == "step")
    env = gym.make(name)
    lengths = [random_steps(env, seed) for seed in range(_EPISODES)]
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    seen = [f"`{key}` {box.shape}" for key, box in env.observation_space.items() if key != MASK]
    speed = speeds.get(f"{name}, 1024")
    return [
        f"`{name}`",
        ", ".join(seen),
        str(env.action_space.n),
        f"{middle:.0f} ({low:.0f} to {high:.0f})",
        f"{round(speed, -3):,.0f}" if speed else "-",
        to_beat(name),
    ]


def to_beat(name: str) -> str:
    """The least published loss on a task, and the method that has it."""
    if name == UNSEEN:
        return f"{str(unseen().estimate(POLICY, 0)).split()[0]} of the order's ({POLICY})"
    scores = {
        entry.name: float(entry.scores("test").mean())
        for entry in published_entries(pinned_task(name).comparison)
        if entry.origin["method"] not in UNCHOSEN and entry.measured_on("test")
    }
    best = min(scores, key=scores.__getitem__, default=None)
    return "-" if best is None else f"{scores[best]:.3f} ({best})"


def tasks_table(names: Sequence[str]) -> str:
    """Pinned tasks, a row each."""
    header = ["Task", "Observation", "Actions", "Steps of an episode", "Steps a second", "To beat"]
    return markdown(pd.DataFrame(map(task_row, names), columns=header))

"""Steps of pinned tasks on score tables, in CPU seconds: ``python -m benchmarks.table_steps``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.harness import Settings, launch, spread
from benchmarks.record import Target, write_record

TASKS = {"ladder": "RAPLadder/SmolLM2-Table-v1", "prune": "RAPPrune/SmolLM2-Table-v1"}


@dataclass
class TableSettings(Settings):
    """Settings of this benchmark."""

    num_envs: int = 64
    """Sub-environments of a vector environment."""
    steps: int = 400
    """Steps of it in one measurement."""


def play(env: Any, steps: int) -> float:
    """CPU seconds of steps with random valid actions, whose choice does not count."""
    rng, (observation, _), total_s = np.random.default_rng(0), env.reset(seed=0), 0.0
    for _ in range(steps):
        mask = observation["action_mask"]
        action = (mask * rng.random(mask.shape)).argmax(axis=-1)
        began = time.process_time()
        observation, *_ = env.step(action)
        total_s += time.process_time() - began
    return total_s


def main(settings: TableSettings) -> None:
    """Measure, and write the record."""
    per_s = {}
    for task, name in TASKS.items():
        env = gym.make_vec(name, num_envs=settings.num_envs)
        steps = settings.steps * settings.num_envs
        per_s[task] = spread([steps / play(env, settings.steps) for _ in range(settings.repeats)])
    targets = [
        Target.of(
            f"steps of `{TASKS[task]}` per CPU second, {settings.num_envs} sub-environments",
            values,
            at_least=50_000.0,
        )
        for task, values in per_s.items()
    ]
    write_record(
        "table_steps", device="cpu", settings=settings, targets=targets,
        measured={"steps_per_cpu_s": per_s},
        notes=["Random valid actions, whose choice does not count."],
    )  # fmt: skip


if __name__ == "__main__":
    launch(TableSettings, main)

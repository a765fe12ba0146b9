"""Steps and a training on the packaged score tables: ``python -m benchmarks.packaged_table``.

All times are those of the process (CPU seconds), because the work is that of one core and a machine
may be shared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.harness import Settings, Target, launch, spread
from benchmarks.record import write_record

EXAMPLE = Path(__file__).parents[1] / "examples" / "ppo_single_file.py"
TASKS = {"v0": "RAPPrune/SmolLM2-Table-v0", "v1": "RAPPrune/SmolLM2-Table-v1"}
GOALS = {1: 15_000.0, 64: 100_000.0, 256: 200_000.0}
"""Steps per CPU second to reach, by the number of sub-environments."""


@dataclass
class TableSettings(Settings):
    """Settings of this benchmark."""

    steps: int = 20_000
    """Steps of all sub-environments in one measurement."""
    sizes: list[int] = field(default_factory=lambda: [*GOALS])
    """Numbers of sub-environments; 1 is the single environment."""
    python: str = sys.executable
    """Interpreter of the training: one with the wheel and nothing else of the project."""
    train: bool = True
    """Whether to run the example that trains an agent."""


class Play:
    """Random valid actions; the time of choosing them does not count.

    Args:
        task: The id of a pinned task on a score table.
        num_envs: Number of sub-environments; 1 for a single environment.
        steps: Steps of all sub-environments in one measurement.
    """

    def __init__(self, task: str, num_envs: int, steps: int) -> None:
        self._single = num_envs == 1
        self._env: Any = (
            gym.make(task, disable_env_checker=True)
            if self._single
            else gym.make_vec(task, num_envs=num_envs, autoreset_mode="SameStep")
        )
        self._rng = np.random.default_rng(0)
        self._calls = max(1, steps // num_envs)
        self._steps = self._calls * num_envs
        self._seen, _ = self._env.reset(seed=0)

    def __call__(self) -> float:
        """Steps per CPU second of one measurement, resets and predicted scores included."""
        spent = 0.0
        for _ in range(self._calls):
            mask = self._seen["action_mask"]
            action = (mask * self._rng.random(mask.shape)).argmax(axis=-1)
            spent += process_s(partial(self._step, action))
        return self._steps / spent

    def _step(self, action: Any) -> None:
        self._seen, _, terminated, truncated, _ = self._env.step(action)
        if self._single and (terminated or truncated):
            self._seen, _ = self._env.reset()


def process_s(run: Callable[[], object]) -> float:
    """CPU seconds of a call in this process."""
    began = time.process_time()
    run()
    return time.process_time() - began


def training_s(python: str) -> float:
    """CPU seconds of the example, imports and its two evaluations included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    before = os.times()
    subprocess.run([python, str(EXAMPLE)], check=True, env=environment, capture_output=True)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main(settings: TableSettings) -> None:
    """Measure, and write the record."""
    targets, measured = [], {}
    for version, task in TASKS.items():
        for size in settings.sizes:
            play = Play(task, size, settings.steps)
            play()  # the warm-up
            rates = spread([play() for _ in range(settings.repeats)])
            what = f"{version}: steps per CPU second, {size} sub-environment{'s' * (size > 1)}"
            if size in GOALS:
                targets.append(Target.of(what, rates, at_least=GOALS[size], against="-"))
            measured[f"{version}_{size}_steps_per_cpu_s"] = rates
    if settings.train:
        seconds = spread([training_s(settings.python) for _ in range(settings.repeats)])
        what = "CPU seconds from the start of Python to a trained agent, `ppo_single_file.py`"
        targets.append(Target.of(what, seconds, at_most=60.0, against="-"))
    write_record(
        "packaged_table",
        device="cpu",
        settings=replace(settings, python=Path(settings.python).name),
        targets=targets,
        measured=measured,
        notes=[
            "Random valid actions, whose choice is not timed; resets and the prediction of scores "
            "that the table has not measured are.",
            "The training has two evaluations of 30 requests; it runs in an environment that has "
            "the wheel only, if `python` names one.",
        ],
    )


if __name__ == "__main__":
    launch(TableSettings, main)

"""Steps of both environments on score tables: ``OMP_NUM_THREADS=1 python -m benchmarks.step``.

A single environment is timed beside a single CartPole, the vector environments of the pinned
tasks beside CartPole's `SyncVectorEnv`, in CPU seconds and in turn. Resets are included; random
valid actions are drawn outside the timing; seeds are fresh, so that hardly any plan was scored
before. One thread, because threads that wait for each other spend CPU seconds too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from benchmarks.measuring import Settings, target, write_record
from experiments.study.console import run_with_settings

TASKS = ("RAPPrune/SmolLM2-Table-v1", "RAPLadder/SmolLM2-Table-v1")
OTHER_TASKS = (
    "RAPLadder/SmolLM2-LowBits-Table-v0",
    "RAPLadder/Gemma3-270M-Table-v1",
    "RAPLadder/Tiny-v0",
    "RAPLadder/TinyGrouped-v0",
    "RAPLadder/TinyEven-v0",
)
"""Tasks of which the steps a second alone are recorded."""

LEAST_RATIOS = {64: 4.0, 1024: 8.0}
"""By sub-environments: how many steps are to be made in the time of one of CartPole's."""

_CART_POLE, _CART_POLES = "CartPole-v1", 64
_CALLS = 10  # of CartPole in a turn


@dataclass
class StepSettings(Settings):
    """Settings of this benchmark."""

    turns: int = 60
    """Turns of CartPole and a task in one measurement."""
    steps: int = 2_000
    """Steps of all sub-environments in one turn of a task."""
    single_steps: int = 500
    """Steps of the single environment in one turn."""


def main(settings: StepSettings) -> None:
    """Measure, and write the record."""
    targets, steps_per_s = [], {}
    single = _ratios(settings, gym.make(_CART_POLE), gym.make(TASKS[0]), settings.single_steps)
    what = f"times the time of a CartPole step that one of `{TASKS[0]}` takes"
    targets.append(target(what, *(1 / r for r, _ in single), at_most=4.0, against=_CART_POLE))
    for num_envs, least in LEAST_RATIOS.items():
        for name in TASKS:
            cart_poles = gym.make_vec(_CART_POLE, _CART_POLES, vectorization_mode="sync")
            envs = gym.make_vec(name, num_envs, info="arrays")
            calls = max(1, settings.steps // num_envs)
            measured = _ratios(settings, cart_poles, envs, calls)
            what = f"times as many steps of `{name}` as of CartPole, {num_envs} sub-environments"
            against = f"{_CART_POLE}, `SyncVectorEnv` of {_CART_POLES}"
            targets.append(target(what, *(r for r, _ in measured), at_least=least, against=against))
            steps_per_s[f"{name}, {num_envs}"] = median(rate for _, rate in measured)
    for name in OTHER_TASKS:
        num_envs = max(LEAST_RATIOS)
        play = player(gym.make_vec(name, num_envs, info="arrays"))
        play(2 * settings.turns)  # after this, episodes end at different times
        steps_per_s[f"{name}, {num_envs}"] = play(2 * settings.turns).steps
    write_record("step", settings, targets, steps_per_s=steps_per_s)


def _ratios(
    settings: StepSettings, cart_pole: Any, task: Any, calls: int
) -> list[tuple[float, float]]:
    """How many steps of a task take the time of one of CartPole; and its steps per CPU second.

    Each of `settings.repeats` measurements is the median of turns.
    """
    sides = player(cart_pole), player(task)
    for side in sides:
        side(2 * calls)  # the first steps make tables
    measured = []
    for _ in range(settings.repeats):
        turns = [(sides[0](_CALLS).steps, sides[1](calls).steps) for _ in range(settings.turns)]
        rates = median(b for _, b in turns)
        measured.append((median(b / a for a, b in turns), rates))
    return measured


class Rates(NamedTuple):
    """What was made in a CPU second: steps, and episodes that ended."""

    steps: float
    episodes: float


def player(env: Any) -> Callable[[int], Rates]:
    """Return what plays on in an environment, for some calls of `step`.

    Actions are random and valid, a single environment is reset where its episode ends.
    """
    rng = np.random.default_rng()
    single, count = isinstance(env, gym.Env), getattr(env, "num_envs", 1)
    seen, _ = env.reset(seed=int(rng.integers(2**31)))

    def play(calls: int) -> Rates:
        nonlocal seen
        spent_s, ended = 0.0, 0
        for _ in range(calls):
            action = env.action_space.sample()
            if isinstance(seen, dict):
                mask = seen["action_mask"]
                action = (mask * rng.random(mask.shape)).argmax(axis=-1)
            began = time.process_time()
            seen, _, terminated, truncated, _ = env.step(action)
            if single and (terminated or truncated):
                seen, _ = env.reset()
            spent_s += time.process_time() - began
            ended += int(np.sum(terminated | truncated))
        return Rates(calls * count / spent_s, ended / spent_s)

    return play


if __name__ == "__main__":
    run_with_settings(StepSettings, main)

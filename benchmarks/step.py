"""Steps of both environments on score tables: ``python -m benchmarks.step``.

Record ``step``: beside CartPole, with random actions, invalid ones among them. Record
``table_steps``: of the pinned tasks, in CPU seconds, with random valid actions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.harness import Settings, alternate, ratios, target, write_record
from experiments.study.console import run_with_settings

TASKS = ("RAPLadder/SmolLM2-Table-v1", "RAPPrune/SmolLM2-Table-v1")
# CartPole's own limit: both have the same wrappers.
_CART_POLE, _MOST_STEPS = "CartPole-v1", 500


@dataclass
class StepSettings(Settings):
    """Settings of this benchmark, which runs on one thread."""

    model: str = "score_table:smollm2-135m"
    workload: str = "azure-conv"
    steps: int = 20_000
    """Steps of a single environment in one measurement."""
    num_envs: int = 64
    """Sub-environments of the vector environment."""
    vector_steps: int = 750
    """Steps of the vector environment in one measurement."""
    table_steps: int = 400
    """Steps of the vector environment of a pinned task in one measurement."""


def main(settings: StepSettings) -> None:
    """Measure, and write both records."""
    measure_beside_cart_pole(settings)
    measure_tasks(settings)


def player(env: Any, count: int) -> Callable[[], None]:
    """A call that runs the same seeded episodes, in a single environment or in a vector of them."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(count)]
    # None: CartPole.
    single, task = isinstance(env, gym.Env), env.unwrapped.__dict__.get("_task")

    def play() -> None:
        if task is not None:  # else a repetition would find each request in the cache
            task.encoder.ladder_bytes.cached_costs.cache_clear()
        env.reset(seed=0)
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if single and (terminated or truncated):
                env.reset()

    return play


def measure_beside_cart_pole(settings: StepSettings) -> None:
    """Time steps whose scores are known, and those of CartPole."""
    task: dict[str, Any] = {"model": settings.model, "workload": settings.workload}
    prune = gym.make("RAPPrune-v0", max_episode_steps=_MOST_STEPS, **task)
    vector = gym.make_vec("RAPPrune-v0", num_envs=settings.num_envs, **task)
    sides = {
        "cart_pole": player(gym.make(_CART_POLE), settings.steps),
        "single": player(prune, settings.steps),
        "vector": player(vector, settings.vector_steps),
    }
    seconds = alternate(sides, settings.repeats)  # the warm-up scores all plans
    cart_pole_us = 1e6 * median(seconds["cart_pole"]) / settings.steps
    vector_steps = settings.vector_steps * settings.num_envs
    against = f"{_CART_POLE}: {cart_pole_us:.1f} µs a step with resets"
    what = "times a CartPole step that a known-score step takes, resets included"
    times = ratios(seconds["single"], seconds["cart_pole"])
    per_s = [vector_steps / s for s in seconds["vector"]]
    rate = f"steps/s of {settings.num_envs} sub-environments, resets included"
    targets = [
        target(what, *times, at_most=4.0, against=against),
        target(rate, *per_s, at_least=100_000.0),
    ]
    write_record("step", settings, targets)


def measure_tasks(settings: StepSettings) -> None:
    """Time steps of the pinned tasks."""
    envs, steps, targets = settings.num_envs, settings.table_steps, []
    for name in TASKS:
        env = gym.make_vec(name, num_envs=envs)
        per_s = [steps * envs / cpu_s(env, steps) for _ in range(settings.repeats)]
        what = f"steps of `{name}` per CPU second, {envs} sub-environments"
        targets.append(target(what, *per_s, at_least=50_000.0))
    write_record("table_steps", settings, targets)


def cpu_s(env: Any, steps: int) -> float:
    """CPU seconds of steps with random valid actions, whose choice does not count."""
    rng, (observation, _), total_s = np.random.default_rng(0), env.reset(seed=0), 0.0
    for _ in range(steps):
        mask = observation["action_mask"]
        action = (mask * rng.random(mask.shape)).argmax(axis=-1)
        began = time.process_time()
        observation, *_ = env.step(action)
        total_s += time.process_time() - began
    return total_s


if __name__ == "__main__":
    run_with_settings(StepSettings, main)

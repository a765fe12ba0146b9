"""Environments on a context, and random episodes in them."""

import json
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rap_env.envs.ladder import RAPLadderEnv, RAPLadderVectorEnv
from rap_env.envs.prune import RAPPruneEnv, RAPPruneVectorEnv
from rap_env.ladder.features import ITEM_FEATURES
from rap_env.request import Request
from tests.envs.tiny_contexts import LAYERS

COUNT, ITEMS = 2 * LAYERS, 3 * LAYERS + 1
NUM_ENVS = 5
MODES = list(AutoresetMode)
DENSE_TIMING = {"name": "perplexity", "timing": "dense"}
LONG = {"batch_size": 8, "seq_len_tokens": 64}  # its budgets need attention blocks removed
USUAL = {"workload": "grid", "infeasible": "clip"}  # a tiny model's workspace is large
LEVELS = {
    "weights": ["int8", "int4", "removed"],
    "caches": ["int8", "int4", "int4-window32"],
    "embeddings": ["int8", "int4"],
}
"""All levels of items, with a window that is short enough for a tiny model's text."""
ONE_BY_ONE = {**USUAL, "levels": LEVELS, "together": []}


@dataclass(frozen=True)
class Task:
    """One of both environments, and what tests of both need to know of it."""

    context: Any
    env: type[gym.Env]
    vector_env: type[gym.vector.VectorEnv]
    settings: dict[str, Any]
    actions: int
    columns: int

    def make(self, context: Any = None, **settings: Any) -> gym.Env:
        return self.env(context=context or self.context, **{**self.settings, **settings})

    def make_vector(self, context: Any = None, **settings: Any) -> gym.vector.VectorEnv:
        settings = {"num_envs": NUM_ENVS, **self.settings, **settings}
        return self.vector_env(context=context or self.context, **settings)

    def make_sync(self, mode, steps=None, context: Any = None, **settings: Any) -> SyncVectorEnv:
        def one() -> gym.Env:
            return self.make(context, max_steps=steps, **settings)

        return SyncVectorEnv([one] * NUM_ENVS, autoreset_mode=mode)


def prune_task(context) -> Task:
    return Task(context, RAPPruneEnv, RAPPruneVectorEnv, USUAL, COUNT, 7)


def ladder_task(context) -> Task:
    columns = len(ITEM_FEATURES)
    return Task(context, RAPLadderEnv, RAPLadderVectorEnv, ONE_BY_ONE, ITEMS, columns)


def make(context, **settings) -> RAPPruneEnv:
    return prune_task(context).make(**settings)


def make_vector(context, **settings) -> RAPPruneVectorEnv:
    return prune_task(context).make_vector(**settings)


def make_sync(context, mode, steps=None, **settings) -> SyncVectorEnv:
    return prune_task(context).make_sync(mode, steps, **settings)


def make_ladder(context, **settings) -> RAPLadderEnv:
    return ladder_task(context).make(**settings)


def request_at(context, fraction: float = 0.8) -> Request:
    return Request.at_fraction(context.memory, *LONG.values(), fraction)


def play(env, seed: int, masked: bool = False) -> list[tuple[Any, ...]]:
    """One episode of random actions: what `reset` and each `step` returned."""
    env.action_space.seed(seed)
    seen, over = [env.reset(seed=seed)], False
    while not over:
        mask = env.unwrapped.action_masks().astype(np.int8) if masked else None
        seen.append(env.step(env.action_space.sample(mask)))
        over = seen[-1][2] or seen[-1][3]
    return seen


def play_first_valid(env, request: Any = None) -> list[tuple[Any, ...]]:
    """The steps of an episode of the first valid actions, on a request or a drawn one."""
    env.reset(seed=0, options={"request": request} if request else None)
    steps: list[tuple[Any, ...]] = []
    while not steps or not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(int(env.unwrapped.action_masks().argmax())))
    return steps


def play_vector(envs, seed: int, steps: int = 60) -> list[tuple]:
    """Random actions, many of them invalid; a reset follows where autoreset does not.

    Returns everything that `reset` and `step` returned.
    """
    rng = np.random.default_rng(seed)
    happened = [envs.reset(seed=seed)]
    for _ in range(steps):
        happened.append(envs.step(rng.integers(envs.single_action_space.n, size=NUM_ENVS)))
        reset_finished(envs, happened)
    return happened


def reset_finished(envs, happened: list[tuple]) -> None:
    """Reset finished sub-environments where autoreset does not."""
    over = happened[-1][2] | happened[-1][3]
    if envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED and over.any():
        happened.append(envs.reset(options={"reset_mask": over}))


def check_resumed(task: Task, steps: int, **settings) -> None:
    """A vector environment with the state of another one goes on as the other does."""
    vector = task.make_vector(**settings)
    start = vector.reset(seed=4)[0]
    for row in np.random.default_rng(0).integers(task.actions, size=(steps, NUM_ENVS)):
        resumed = task.make_vector(**settings)
        assert_same(resumed.set_state(json.loads(json.dumps(vector.get_state()))), start)
        results = [vector.step(row)]
        assert_same(resumed.step(row), results[0])
        reset_finished(vector, results)
        start = results[-1][0]


def assert_same(one, other, where="") -> None:
    """Equal bit for bit, types included."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        if one.dtype == object:
            assert_same(one.tolist(), other.tolist(), where)
        else:
            assert np.array_equal(one, other), where
    else:
        assert one == other, where

"""Vector environments on a context, and random episodes in them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from rap_env.envs.vector import RAPPruneVectorEnv
from tests.envs.playing import COUNT, USUAL, make

LANES = 5
MODES = list(AutoresetMode)


def make_vector(context, **settings) -> RAPPruneVectorEnv:
    return RAPPruneVectorEnv(context=context, num_envs=LANES, **{**USUAL, **settings})


def make_sync(context, mode, steps=None, **settings) -> SyncVectorEnv:
    def one() -> gym.Env:
        env = make(context, **settings)
        return env if steps is None else TimeLimit(env, steps)

    return SyncVectorEnv([one] * LANES, autoreset_mode=mode)


def play_lanes(envs, seed: int, steps: int = 60) -> list[tuple]:
    """Random actions, many of them invalid; lanes that are over are reset where nothing else does.

    What happens is everything that `reset` and `step` returned.
    """
    rng = np.random.default_rng(seed)
    happened = [envs.reset(seed=seed)]
    for _ in range(steps):
        happened.append(envs.step(rng.integers(COUNT, size=LANES)))
        over = happened[-1][2] | happened[-1][3]
        if envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED and over.any():
            happened.append(envs.reset(options={"reset_mask": over}))
    return happened

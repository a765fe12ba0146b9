"""Vector environments on a context, and random episodes in them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rap_env.envs.prune import RAPPruneVectorEnv
from tests.envs.playing import COUNT, USUAL, make

NUM_ENVS = 5
MODES = list(AutoresetMode)


def make_vector(context, **settings) -> RAPPruneVectorEnv:
    return RAPPruneVectorEnv(context=context, num_envs=NUM_ENVS, **{**USUAL, **settings})


def make_sync(context, mode, steps=None, **settings) -> SyncVectorEnv:
    def one() -> gym.Env:
        return make(context, max_steps=steps, **settings)

    return SyncVectorEnv([one] * NUM_ENVS, autoreset_mode=mode)


def play_vector(envs, seed: int, steps: int = 60) -> list[tuple]:
    """Random actions, many of them invalid; a reset follows where autoreset does not.

    Returns everything that `reset` and `step` returned.
    """
    rng = np.random.default_rng(seed)
    happened = [envs.reset(seed=seed)]
    for _ in range(steps):
        happened.append(envs.step(rng.integers(COUNT, size=NUM_ENVS)))
        over = happened[-1][2] | happened[-1][3]
        if envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED and over.any():
            happened.append(envs.reset(options={"reset_mask": over}))
    return happened

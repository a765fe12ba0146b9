"""Environments on a context, and random episodes in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from rap_env.envs.prune import RAPPruneEnv
from rap_env.request import Request
from tests.envs.conftest import LAYERS

COUNT = 2 * LAYERS
DENSE_TIMING = {"name": "perplexity", "timing": "dense"}
LONG = {"batch_size": 8, "seq_len_tokens": 64}  # its budgets need attention blocks removed
USUAL = {"workload": "grid", "infeasible": "clip"}  # a tiny model's workspace is large


def make(context, **settings) -> RAPPruneEnv:
    return RAPPruneEnv(context=context, **{**USUAL, **settings})


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

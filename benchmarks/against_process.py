"""The work that `benchmarks.against` measures, in a process that imports `rap_env` alone.

Reads a JSON object with the names of the checkout from the first line of standard input, and the
name of a work from each further one; answers with all names, and with the CPU seconds of each.
"""

from __future__ import annotations

import json
import pydoc
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rap_env


def works(names: dict[str, str]) -> dict[str, Callable[[], float]]:
    """Calls that do a piece of work and return its CPU seconds, by name; loads the model."""
    torch.set_num_threads(1)
    llm, lengths = rap_env.load_llm("smollm2-135m", device="cpu"), iter(range(200, 10**6))
    memory = rap_env.MemoryModel(llm)
    policy = rap_env.load_policy(names["policy"], memory)
    text = rap_env.load_corpus(rap_env.CorpusConfig(windows=2, window_tokens=128), llm)
    make_plan: Any = pydoc.locate(names["plan"])
    make_batch: Any = pydoc.locate(names["batch"])
    orders = [np.random.default_rng(n).permutation(len(llm.blocks)).tolist() for n in range(4)]
    plans = [make_plan(*order[: 2 * n]) for order in orders for n in range(1, 7)]
    batch = make_batch(llm)
    batch.prefill([[1] * 256])

    def decide() -> None:
        for _ in range(40):
            policy.choose(rap_env.Request.at_fraction(memory, 4, next(lengths), 0.6))

    named: dict[str, Callable[[], float]] = {}
    for task in ("prune", "ladder"):
        env = gym.make(names[task], disable_env_checker=True)
        named[f"{task}: step"] = partial(play, env, 4000)
        named[f"{task}: step of 64"] = partial(play, gym.make_vec(names[task], num_envs=64), 200)
    named["nll_many"] = partial(cpu_seconds, lambda: rap_env.MaskScorer(llm, text).nll_many(plans))
    named["decode step"] = partial(cpu_seconds, lambda: [batch.extend([1]) for _ in range(16)])
    named["decision"] = partial(cpu_seconds, decide)
    return named


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def play(env: Any, steps: int) -> float:
    """CPU seconds of steps with random valid actions, whose choice does not count."""
    rng, (observation, _), total_s = np.random.default_rng(0), env.reset(seed=0), 0.0
    for _ in range(steps):
        mask = observation["action_mask"]
        action = (mask * rng.random(mask.shape)).argmax(axis=-1)
        began = time.process_time()
        observation, _, terminated, truncated, _ = env.step(action)
        if mask.ndim == 1 and (terminated or truncated):
            observation, _ = env.reset()
        total_s += time.process_time() - began
    return total_s


def serve() -> None:
    """Read names of works, one a line, and answer with the CPU seconds of each."""
    named = works(json.loads(sys.stdin.readline()))
    print(json.dumps(list(named)), flush=True)
    for line in sys.stdin:
        print(named[line.strip()](), flush=True)


if __name__ == "__main__":
    serve()

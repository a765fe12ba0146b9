"""A baseline of your own, in a checkout: the better of the plans of two others.

    PYTHONPATH=. python examples/custom_baseline.py

`experiments.evaluate` takes it as it is, beside ours, on held-out text and with its costs counted:

    python -m experiments.evaluate env=ladder model.weights=native importance=one_shot \
        'evaluate.baselines=[knapsack, one_shot, "examples.custom_baseline:BetterOfTwo"]'

A package would offer it as an entry point (see the page on training).
"""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym

import rap_env
from agents.baselines import LadderBaseline, make_baseline
from agents.baselines.base import CountingScorer
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.plan import Plan

TASK = "RAPPrune/SmolLM2-Table-v1"
ASKED = ("knapsack", "one_shot")
NAME = "examples.custom_baseline:BetterOfTwo"  # package.module:name, as in settings


class BetterOfTwo(LadderBaseline):
    """Scores the plans of two baselines and takes the better one.

    A baseline over masks derives from `agents.baselines.Baseline` instead.
    """

    name = "better_of_two"

    def __init__(self, context: Any, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        self.asked = [make_baseline(name, context, seed, item_bytes) for name in ASKED]
        self.setup_evaluations = sum(one.setup_evaluations for one in self.asked)

    def _choose(self, request: rap_env.Request, scores: CountingScorer) -> Plan:
        """The choice for a request that can be met; `scores` counts what it measures."""
        return scores.best([one.choose(request) for one in self.asked])


def baselines(names: tuple[str, ...]) -> dict[str, Any]:
    """Baselines on the score table of the task, by name."""
    env: Any = gym.make(TASK).unwrapped
    item_bytes = LadderBytes(env.memory, env.ladder)
    return {name: make_baseline(name, env.context, 0, item_bytes) for name in names}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*out of date.*")
    for name, baseline in baselines((*ASKED, NAME)).items():
        found = rap_env.evaluate(baseline, TASK, name=name)
        cost = f"{baseline.evaluations} plans scored"
        print(f"{name:38} mean ΔNLL {found.mean_delta_nll:.4f} nats/token, {cost}")

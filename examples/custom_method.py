"""A method of your own in one file: compared with ours, served and exported by its name.

    python examples/custom_method.py

`NAME` is taken wherever a policy is named, as any ``package.module:Class``:

    python -m experiments.evaluate env=ladder model.weights=native importance=one_shot \
        'evaluate.baselines=[knapsack, one_shot, "examples.custom_method:BetterOfTwo"]'
    PYTHONPATH=. rap choose --policy examples.custom_method:BetterOfTwo \
        --batch 8 --seq 1024 --budget 200MiB
    PYTHONPATH=. rap serve --policy examples.custom_method:BetterOfTwo

In a checkout, the same class in a file of `rap_env/policies/`, with `@register` in front of it,
has the name `name`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import rap_env
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import CountingScorer, Method

TASK = "RAPLadder/SmolLM2-Table-v1"
ASKED = ("knapsack", "one_shot")
NAME = "examples.custom_method:BetterOfTwo"


class BetterOfTwo(Method):
    """Scores the plans of two other methods and takes the better one."""

    name = "better_of_two"

    def _choose(self, request: rap_env.Request, scores: CountingScorer) -> Plan:
        """The choice where the native model does not fit; `scores` counts what it measures."""
        asked = [make_method(name, self.context, self.ladder_bytes, self.seed) for name in ASKED]
        return scores.best([method.choose(request) for method in asked])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # `NAME` is imported
    for name in (*ASKED, NAME):
        result = rap_env.evaluate(name, TASK, name=name)
        scored = sum(cell.evaluations for cell in result.cells)
        print(f"{name:38} mean ΔNLL {result.mean_delta_nll:.4f} nats/token, {scored} plans scored")

"""A method for the leaderboard: a local search on the score table, and its entry.

    python examples/leaderboard_entry.py

Anything with `choose(request)` can be evaluated; it may use the table of the task, as the
published searches did. The search starts from the best measured plan and raises one item
while it lowers another.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

import rap_env
from rap_env.plan import Plan

TASK = "RAPLadder/SmolLM2-Table-v1"


class LocalSearch:
    """Improves the best measured plan by exchanging levels, as long as the prediction falls."""

    def __init__(self, tries: int = 300, seed: int = 0) -> None:
        self.env = gym.make(TASK).unwrapped
        self.memory, self.scorer = self.env.memory, self.env.context.scorer
        self.tries = tries
        self.rng = np.random.default_rng(seed)

    def choose(self, request: rap_env.Request) -> Plan:
        """The best plan that was found."""
        best = self.env.context.best_measured(request)
        for _ in range(self.tries):
            other = self.exchanged(best)
            if self.fits(other, request) and self.scorer.nll(other) < self.scorer.nll(best):
                best = other
        return best

    def fits(self, plan: Plan, request: rap_env.Request) -> bool:
        """Whether a plan is within the budget."""
        return self.memory.peak_bytes(plan, request) <= request.budget_bytes

    def exchanged(self, plan: Plan) -> Plan:
        """The plan with one lowered item back at its native level and another one lowered."""
        items, levels = self.env.ladder.items, dict(plan.levels)
        if levels:
            levels.pop(str(self.rng.choice(sorted(levels))))
        item = items[self.rng.integers(len(items))]
        levels[item.name] = str(self.rng.choice(item.levels[1:]))
        return Plan.of(levels)


if __name__ == "__main__":
    result = rap_env.evaluate(LocalSearch(), TASK, "test", name="local search")
    print(result)
    path = result.entry("Exchanges levels on predicted losses.").save("runs/local_search.json")
    print(f"Check it with: python -m experiments.leaderboard check {path}")

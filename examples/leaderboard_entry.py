"""A method for the leaderboard: a local search on the score table, and its entry.

    python examples/leaderboard_entry.py

A method has the context of the task: its score table, the byte arithmetic of the model and the
items of the ladder. The search starts from the best measured plan and raises one item while it
lowers another. Where the task's table has not measured its plans, `measure=True` runs the model.
"""

from __future__ import annotations

import numpy as np

import rap_env
from rap_env.plan import Plan
from rap_env.policies.method import CountingScorer, Method

TASK = "RAPLadder/SmolLM2-Table-v1"


class LocalSearch(Method):
    """Improves the best measured plan by exchanging levels, as long as the prediction falls."""

    name = "local_search"
    tries = 300

    def _choose(self, request: rap_env.Request, scores: CountingScorer) -> Plan:
        rng, best = self.random(request), self.context.best_measured(request)
        for _ in range(self.tries):
            other = self.exchanged(best, rng)
            if self.fits(other, request) and scores.nll(other) < scores.nll(best):
                best = other
        return best

    def exchanged(self, plan: Plan, rng: np.random.Generator) -> Plan:
        """The plan with one lowered item back at its native level and another one lowered."""
        items, levels = self.ladder.items, dict(plan.levels)
        if levels:
            levels.pop(str(rng.choice(sorted(levels))))
        item = items[rng.integers(len(items))]
        levels[item.name] = str(rng.choice(item.levels[1:]))
        return Plan.of(levels)


if __name__ == "__main__":
    result = rap_env.evaluate(LocalSearch, TASK, "test", name="local search")
    print(result)
    path = result.entry("Exchanges levels on predicted losses.").save("runs/local_search.json")
    print(f"Check it with: python -m experiments.leaderboard check {path}")

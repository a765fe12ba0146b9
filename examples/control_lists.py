"""Controls for a policy: one list of steps for all requests, by cost per byte or tuned.

    python examples/control_lists.py

The list is followed until the request fits, so that a smaller budget lowers what a larger one
does, and more. What the lists are chosen by is what an agent sees: requests of the training
workload, and what the task's table says of plans, measured or predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import rap_env
from rap_env.context.base import costs_of
from rap_env.importance.orders import LoweringStep, by_level, greedy_order
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.workload import make_sampler

TASK = "RAPLadder/SmolLM2-Table-v1"
SHAPES = [(batch_size, 1024) for batch_size in (1, 2, 4, 6, 8, 12, 16, 24)]
REQUESTS, TUNED_ON = 256, 64
PREDICTIONS = 15_000  # at most: as many as `ppo_single_file.py` has episodes
MOVES, FARTHEST = 1500, 0.1  # of one step, by normal noise on its place in [0, 1]


class FixedList(Method):
    """One list for all requests, by cost per byte at the best of eight shapes."""

    name = "fixed_list"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        sampler, rng = make_sampler(basis.workload, self.memory), np.random.default_rng(self.seed)
        self.requests = [sampler.sample(rng) for _ in range(REQUESTS)]
        costs = costs_of(self.context, self.ladder)
        self.setup_evaluations = costs.evaluations
        lists = [greedy_order(costs, self.ladder_bytes, shape=shape).steps for shape in SHAPES]
        self.steps: Sequence[LoweringStep] = min(lists, key=self.mean_nll)

    def mean_nll(self, steps: Sequence[LoweringStep]) -> float:
        """Mean NLL of the plans of a list at the training requests, nats per token."""
        plans = [self.plan(steps, request) for request in self.requests]
        return float(np.mean(self.context.scorer.nll_many(plans)))

    def plan(self, steps: Sequence[LoweringStep], request: rap_env.Request) -> Plan:
        """The plan at which a list fits a request."""
        return self.costs(request).lower_until_fits(steps, request.budget_bytes)

    def _choose(self, request: rap_env.Request, scores: CountingScorer) -> Plan:
        return self.plan(self.steps, request)


class TunedList(FixedList):
    """One list for all requests, tuned on the training workload by moving single steps."""

    name = "tuned_list"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self.requests = self.requests[:TUNED_ON]
        rng, scorer = np.random.default_rng(self.seed), self.context.scorer
        known = scorer.known
        best_nll, places = self.mean_nll(self.steps), np.linspace(0, 1, len(self.steps))
        for _ in range(MOVES):
            if scorer.known - known > PREDICTIONS:
                break
            moved = places.copy()
            moved[rng.integers(len(moved))] += rng.normal(scale=FARTHEST)
            steps = by_level(self.steps[number] for number in np.argsort(moved, kind="stable"))
            if (nll := self.mean_nll(steps)) <= best_nll:
                self.steps, best_nll = steps, nll
        self.setup_evaluations += scorer.known - known


if __name__ == "__main__":
    for method in (FixedList, TunedList):
        print(rap_env.evaluate(method, TASK, "test", name=method.name), end="\n\n")

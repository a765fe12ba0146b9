"""Controls for a policy: the best of 500 random orders, and the best of 500 noisy ones.

    python examples/control_orders.py

An order of steps is followed until the request fits. The 500 plans of a request are compared
by what the task's table says, measured or predicted.
"""

from __future__ import annotations

import numpy as np

import rap_env
from rap_env.context.base import costs_of
from rap_env.importance.orders import by_level, greedy_order
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method

TASK = "RAPLadder/SmolLM2-Table-v1"
ORDERS = 500


class NoisyOrders(Method):
    """The best by prediction of 500 noisy orders by cost per byte."""

    name = "noisy_orders"
    noise: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Standard deviations of the noise on a step's place in [0, 1]; an order has one of
    them."""

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self.level_costs = costs_of(self.context, self.ladder)
        self.setup_evaluations = self.level_costs.evaluations

    def _choose(self, request: rap_env.Request, scores: CountingScorer) -> Plan:
        shape = request.batch_size, request.seq_len_tokens
        steps = greedy_order(self.level_costs, self.ladder_bytes, shape=shape).steps
        rng, costs = self.random(request), self.costs(request)
        places = np.linspace(0, 1, len(steps))
        plans = []
        for _ in range(ORDERS):
            order = np.argsort(rng.normal(places, rng.choice(self.noise)))
            noisy = by_level(steps[number] for number in order)
            plans.append(costs.lower_until_fits(noisy, request.budget_bytes))
        return scores.best(plans)


class RandomOrders(NoisyOrders):
    """The best by prediction of 500 random orders."""

    name = "random_orders"
    noise = (1e6,)


if __name__ == "__main__":
    for method in (RandomOrders, NoisyOrders):
        print(rap_env.evaluate(method, TASK, "test", name=method.name), end="\n\n")

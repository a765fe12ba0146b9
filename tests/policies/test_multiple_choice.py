"""The multiple-choice knapsack: exact against brute force and against an integer programme."""

import itertools

import numpy as np
import pytest

from rap_env.policies.multiple_choice import MultipleChoice


def made(rng, style):
    """A small instance: any options, few distinct values with ties, or levels as models have."""
    sizes, costs = [], []
    for _ in range(rng.integers(1, 6)):
        count = rng.integers(1, 5)
        if style == "any":
            held, price = rng.integers(0, 50, count), rng.random(count)
        elif style == "ties":
            held, price = rng.choice([0, 5, 10, 20], count), rng.choice([0, 0.1, 0.2, 0.3], count)
        else:
            held = np.sort(rng.choice(40, count, replace=False))[::-1]
            price = np.sort(rng.random(count))
        sizes.append(held.tolist())
        costs.append(price.tolist())
    return sizes, costs


def totals(sizes, costs, chosen):
    rows = list(enumerate(chosen))
    return sum(sizes[i][k] for i, k in rows), sum(costs[i][k] for i, k in rows)


@pytest.mark.parametrize("style", ["any", "ties", "levels"])
def test_it_equals_brute_force(style):
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, costs = made(rng, style)
        every = [
            totals(sizes, costs, chosen)
            for chosen in itertools.product(*(range(len(held)) for held in sizes))
        ]
        solver = MultipleChoice(sizes, costs)
        assert solver.least_bytes == min(held for held, _ in every)
        for budget in rng.integers(0, sum(map(max, sizes)) + 2, 4):
            best = min((cost for held, cost in every if held <= budget), default=None)
            found = solver.solve(int(budget))
            if best is None:
                assert found is None
                continue
            held, cost = totals(sizes, costs, found)
            assert held <= budget
            # Sums in another order differ in their last bits.
            assert cost == pytest.approx(best, abs=1e-9)
            assert cost == pytest.approx(solver.cost(found))

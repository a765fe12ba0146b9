"""The multiple-choice knapsack: exact against brute force and against an integer programme."""

from __future__ import annotations

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


def levels_like_a_model(rng, layers=12):
    """Attention blocks with their caches, FFN blocks, embeddings; equal bytes in all layers."""
    sizes, costs = [], []
    for _ in range(layers):
        base, factor = np.array([1e-5, 5e-4, 1.5e-2, 0.3]), rng.lognormal(0, 1)
        sizes += [[2_460_000, 1_700_000, 1_390_000, 1_180_000, 0], [2_654_208, 0]]
        costs += [[0.0, *(base * factor)], [0.0, rng.lognormal(-1.5, 0.8)]]
    return [*sizes, [30_000_000]], [*costs, [0.0]]


def test_it_equals_an_integer_programme():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        sizes, costs = levels_like_a_model(rng)
        solver = MultipleChoice(sizes, costs)
        most = sum(map(max, sizes))
        budget = int(solver.least_bytes + share * (most - solver.least_bytes))
        lengths = np.array([len(held) for held in sizes])
        owner = np.repeat(np.arange(len(sizes)), lengths)
        flat = np.array([size for held in sizes for size in held], dtype=float) / 1e6
        one_each = (owner == np.arange(len(sizes))[:, None]).astype(float)
        found = optimize.milp(
            np.array([cost for price in costs for cost in price]),
            integrality=np.ones(len(flat)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(flat[None], -np.inf, budget / 1e6),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert found.success
        chosen = solver.solve(budget)
        held, cost = totals(sizes, costs, chosen)
        assert held <= budget
        # The integer programme's own tolerances are 1e-6 of a variable and of the objective.
        assert cost == pytest.approx(found.fun, abs=2e-6)


def test_a_budget_that_needs_nothing_takes_the_cheapest_options():
    solver = MultipleChoice([[10, 4], [7, 3]], [[0.0, 1.0], [0.0, 2.0]])
    assert solver.solve(17).tolist() == [0, 0]
    assert solver.solve(16).tolist() == [1, 0]
    assert solver.solve(7).tolist() == [1, 1]
    assert solver.solve(6) is None
    assert solver.least.tolist() == [1, 1]

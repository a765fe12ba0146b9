"""Level switches at equal bytes: offspring fit, are minimal, and stay near their parent."""

from __future__ import annotations

import numpy as np
import pytest

from agents.baselines import make_baseline
from agents.baselines.base import measure_choice
from agents.baselines.ladder.base import level_above, raised
from agents.baselines.ladder.evolutionary import LadderEvolutionaryBaseline, mutated
from tests.agents.baselines.ladder.conftest import SHAPES


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def alone(item_bytes, shape):
    """The bytes for a request, with a ladder in which nothing is taken together."""
    return item_bytes.costs(*shape).one_by_one


def test_offspring_fit_and_no_item_is_lower_than_it_must(context, item_bytes, request_at, shape):
    request, costs = request_at(shape, 0.5), alone(item_bytes, shape)
    parent = make_baseline("one_shot", context, 0, item_bytes).choose(request)
    rng = np.random.default_rng(0)
    children = [mutated(costs, request.budget_bytes, parent, rng) for _ in range(60)]
    found = set(children) - {None, parent}
    assert len(found) > 2
    for plan in found:
        assert context.memory.peak_bytes(plan, request) <= request.budget_bytes
        positions = tuple(costs.ladder.positions(plan))
        assert costs.ladder.plan(positions) == plan
        for item in range(len(positions)):
            higher = level_above(costs, positions, item)
            if higher is not None:
                assert costs.state(higher).peak_bytes > request.budget_bytes


def test_raising_undoes_lowering(item_bytes, shape):
    costs = alone(item_bytes, shape)
    rng = np.random.default_rng(1)
    for _ in range(20):
        state = costs.state()
        for _ in range(int(rng.integers(0, 25))):
            valid = [item for item in range(len(costs.ladder)) if state.is_valid(item)]
            if not valid:
                break
            item = int(rng.choice(valid))
            before = tuple(state.positions)
            state.lower(item)
            after = level_above(costs, tuple(state.positions), item)
            partner = costs.ladder.partners[item]
            # A cache that comes back with its block has the level of the others.
            assert [n for n, p in enumerate(after) if p != before[n]] in ([], [partner])
        order = rng.permutation(len(costs.ladder)).tolist()
        assert not any(raised(costs, tuple(state.positions), order, 2**40))


def test_a_block_returns_with_the_level_of_most_caches(item_bytes):
    costs = alone(item_bytes, SHAPES[1])
    ladder, state = costs.ladder, costs.state()
    for _ in range(3):
        state.lower(0)  # the first attention block is removed
    for cache in ladder.caches[1:]:
        state.lower(cache)
    higher = level_above(costs, tuple(state.positions), 0)
    assert [ladder.items[cache].levels[higher[cache]] for cache in ladder.caches] == ["int8"] * 3


def test_it_improves_on_its_starts_within_its_evaluations(context, item_bytes, request_at, shape):
    request = request_at(shape, 0.4)
    few = LadderEvolutionaryBaseline(context, item_bytes, max_evaluations=4)
    many = LadderEvolutionaryBaseline(context, item_bytes, max_evaluations=120)
    found = [measure_choice(baseline, request, context.scorer) for baseline in (few, many)]
    losses = [context.scorer.nll(choice.plan) for choice in found]
    assert losses[1] <= losses[0]
    assert all(choice.evaluations <= most for choice, most in zip(found, (4, 120), strict=True))
    assert measure_choice(many, request, context.scorer).plan == found[1].plan

"""Level switches at equal bytes: offspring fit, are minimal, and stay near their parent."""

import itertools

import numpy as np
import pytest

from rap_env.plan import Plan
from rap_env.policies.evolutionary import _level_above, _mutated
from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from tests.agents.synthetic import SyntheticContext, request_at
from tests.policies.requests import SHAPES, fits
from tests.policies.test_searches import made

REQUESTS = [(1, 10, 0.7), (8, 250, 0.8), (16, 1000, 0.6)]


@pytest.fixture
def small():
    """4 layers whose blocks raise each other's cost, so that no simple mask is the best."""
    rng = np.random.default_rng(3)
    return SyntheticContext(rng.lognormal(-2, 1, 8), interaction=3.0)


@pytest.fixture
def large():
    """20 layers: too many masks to try them all."""
    rng = np.random.default_rng(4)
    return SyntheticContext(rng.lognormal(-3, 1, 40), interaction=3.0)


def least_loss(context, request):
    """By enumeration of all masks."""
    blocks = range(context.memory.facts.num_blocks)
    masks = (
        Plan.removing(*chosen)
        for count in range(len(blocks) + 1)
        for chosen in itertools.combinations(blocks, count)
    )
    return min(context.scorer.loss(mask) for mask in masks if fits(context, mask, request))


@pytest.mark.parametrize("shape", REQUESTS)
def test_finds_the_best_mask_of_a_small_model(small, shape):
    request = request_at(small, *shape)
    mask = make_method("evolutionary", small).choose(request)
    assert fits(small, mask, request)
    assert small.scorer.loss(mask) == pytest.approx(least_loss(small, request))


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def alone(ladder_bytes, shape):
    """The bytes for a request, with a ladder in which nothing is taken together."""
    return ladder_bytes.costs(*shape).one_by_one


def test_offspring_fit_and_no_item_is_lower_than_it_must(
    ladder_context, ladder_bytes, between, shape
):
    request, costs = between(shape, 0.5), alone(ladder_bytes, shape)
    parent = make_method("one_shot", ladder_context, ladder_bytes).choose(request)
    rng = np.random.default_rng(0)
    children = [_mutated(costs, request.budget_bytes, parent, rng) for _ in range(60)]
    found = set(children) - {None, parent}
    assert len(found) > 2
    for plan in found:
        assert fits(ladder_context, plan, request)
        positions = tuple(costs.ladder.positions(plan))
        assert costs.ladder.plan(positions) == plan
        for item in range(len(positions)):
            higher = _level_above(costs, positions, item)
            if higher is not None:
                assert costs.state(higher).peak_bytes > request.budget_bytes


def test_it_improves_on_its_starts_within_its_evaluations(
    ladder_context, ladder_bytes, between, shape
):
    request = between(shape, 0.4)
    few, many = (
        made("evolutionary", ladder_context, ladder_bytes, max_evaluations=most)
        for most in (4, 120)
    )
    scorer = ladder_context.scorer
    found = [measure_choice(method, request, scorer) for method in (few, many)]
    losses = [scorer.nll(choice.plan) for choice in found]
    assert losses[1] <= losses[0]
    assert all(choice.evaluations <= most for choice, most in zip(found, (4, 120), strict=True))
    assert measure_choice(many, request, scorer).plan == found[1].plan

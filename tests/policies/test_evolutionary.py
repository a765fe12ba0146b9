"""Level switches at equal bytes: offspring fit, are minimal, and stay near their parent."""

import itertools
from functools import partial

import numpy as np
import pytest

from rap_env.plan import Plan
from rap_env.policies.evolutionary import Evolution, _level_above, _mutated
from rap_env.policies.loading import make_method
from rap_env.policies.method import CountingScorer, measure_choice
from rap_env.policies.registry import methods
from tests.agents.synthetic import SyntheticContext, request_at
from tests.policies.requests import SHAPES, fits, needing
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


@pytest.mark.parametrize("shape", REQUESTS)
@pytest.mark.parametrize("evaluations", [1, 10, 33, 100])
def test_keeps_its_budget_and_is_no_worse_than_its_start(large, shape, evaluations):
    request = request_at(large, *shape)
    baseline = made("evolutionary", large, max_evaluations=evaluations)
    starts = [start.choose(request) for start in baseline._starts][:evaluations]
    start = min(large.scorer.loss(plan) for plan in starts)
    choice = measure_choice(baseline, request, large.scorer)
    assert fits(large, choice.plan, request)
    assert choice.evaluations <= evaluations
    assert large.scorer.loss(choice.plan) <= start


def test_seed_and_request_decide(large):
    def masks(request, evaluations=20):
        return [
            made("evolutionary", large, max_evaluations=evaluations, seed=seed).choose(request)
            for seed in range(6)
        ]

    request = request_at(large, 1, 10, 0.7)
    first = masks(request)
    assert masks(request) == first
    assert len(set(first)) > 1
    assert methods()["evolutionary"].seeded


def test_evaluations_count_stored_scores_too(large):
    request = request_at(large, 1, 10, 0.7)
    baseline = made("evolutionary", large, max_evaluations=60)
    before = large.scorer.passes
    first = measure_choice(baseline, request, large.scorer)
    assert first.evaluations == np.ceil(large.scorer.passes - before)
    assert first.decision_s < large.scorer.evaluation_s  # all of it was really run
    again = measure_choice(baseline, request, large.scorer)
    assert (again.plan, again.evaluations) == (first.plan, first.evaluations)
    assert again.decision_s > large.scorer.evaluation_s


def test_offspring_fit_the_budget_and_are_minimal(large):
    request = request_at(large, 8, 250, 0.7)
    method = make_method("evolutionary", large)
    mutate = partial(_mutated, method.costs(request), request.budget_bytes)
    scores, rng = CountingScorer(large.scorer), np.random.default_rng(0)
    search = Evolution(mutate, scores, rng, max_evaluations=500)
    search._select([make_method("gsi", large).choose(request)])
    offspring = list(search._offspring(200))
    assert len(set(offspring)) == len(offspring) == 200
    for plan in offspring:
        assert fits(large, plan, request)
        assert not any(fits(large, Plan(plan.removed - {i}), request) for i in plan.removed)
        shared = search.parent.removed & plan.removed
        assert len(shared) > len(search.parent.removed) / 2  # a few switches away


def test_the_search_ends_when_no_new_mask_is_left(small):
    # One attention block suffices and any does: few masks are near, and none is tried twice.
    method = make_method("evolutionary", small)
    choice = measure_choice(method, needing(small, 900), small.scorer)
    assert len(choice.plan.removed) == 1
    assert choice.evaluations < 30


def test_a_text_of_one_window_is_searched_too(small):
    small.scorer.num_windows = 1
    request = request_at(small, 8, 250, 0.8)
    choice = measure_choice(made("evolutionary", small, max_evaluations=40), request, small.scorer)
    assert choice.evaluations <= 40
    assert small.scorer.windows_run == 0


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def alone(item_bytes, shape):
    """The bytes for a request, with a ladder in which nothing is taken together."""
    return item_bytes.costs(*shape).one_by_one


def test_offspring_fit_and_no_item_is_lower_than_it_must(
    ladder_context, item_bytes, between, shape
):
    request, costs = between(shape, 0.5), alone(item_bytes, shape)
    parent = make_method("one_shot", ladder_context, item_bytes).choose(request)
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
    ladder_context, item_bytes, between, shape
):
    request = between(shape, 0.4)
    few, many = (
        made("evolutionary", ladder_context, item_bytes, max_evaluations=most) for most in (4, 120)
    )
    scorer = ladder_context.scorer
    found = [measure_choice(method, request, scorer) for method in (few, many)]
    losses = [scorer.nll(choice.plan) for choice in found]
    assert losses[1] <= losses[0]
    assert all(choice.evaluations <= most for choice, most in zip(found, (4, 120), strict=True))
    assert measure_choice(many, request, scorer).plan == found[1].plan

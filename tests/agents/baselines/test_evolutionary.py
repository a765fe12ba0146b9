from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from agents.baselines.base import CountingScorer, fits, measure_choice
from agents.baselines.evolutionary import Evolution, EvolutionaryBaseline, mutated
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at

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
    return min(context.scorer.loss(mask) for mask in masks if fits(context.memory, mask, request))


@pytest.mark.parametrize("shape", REQUESTS)
def test_finds_the_best_mask_of_a_small_model(small, shape):
    request = request_at(small, *shape)
    mask = EvolutionaryBaseline(small).choose(request)
    assert fits(small.memory, mask, request)
    assert small.scorer.loss(mask) == pytest.approx(least_loss(small, request))


@pytest.mark.parametrize("shape", REQUESTS)
@pytest.mark.parametrize("evaluations", [1, 10, 33, 100])
def test_keeps_its_budget_and_is_no_worse_than_its_start(large, shape, evaluations):
    request = request_at(large, *shape)
    baseline = EvolutionaryBaseline(large, max_evaluations=evaluations)
    starts = baseline._start_masks(request)[:evaluations]
    start = min(large.scorer.loss(mask) for mask in starts)
    choice = measure_choice(baseline, request, large.scorer)
    assert fits(large.memory, choice.plan, request)
    assert choice.evaluations <= evaluations
    assert large.scorer.loss(choice.plan) <= start


@pytest.mark.slow
def test_more_evaluations_find_better_masks(large):
    request = request_at(large, 1, 10, 0.7)
    losses = [
        large.scorer.loss(EvolutionaryBaseline(large, 0, evaluations).choose(request))
        for evaluations in (6, 60, 500)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_seed_and_request_decide(large):
    def masks(request, evaluations=20):
        return [EvolutionaryBaseline(large, seed, evaluations).choose(request) for seed in range(6)]

    request = request_at(large, 1, 10, 0.7)
    first = masks(request)
    assert masks(request) == first
    assert len(set(first)) > 1
    assert EvolutionaryBaseline.seeded


def test_evaluations_count_stored_scores_too(large):
    request = request_at(large, 1, 10, 0.7)
    baseline = EvolutionaryBaseline(large, max_evaluations=60)
    before = large.scorer.passes
    first = measure_choice(baseline, request, large.scorer)
    assert first.evaluations == np.ceil(large.scorer.passes - before)
    assert first.decision_s < large.scorer.evaluation_s  # all of it was really run
    again = measure_choice(baseline, request, large.scorer)
    assert (again.plan, again.evaluations) == (first.plan, first.evaluations)
    assert again.decision_s > large.scorer.evaluation_s


def test_offspring_fit_the_budget_and_are_minimal(large):
    request = request_at(large, 8, 250, 0.7)
    baseline = EvolutionaryBaseline(large)
    mutate = partial(mutated, large.memory, request)
    search = Evolution(Plan(), mutate, CountingScorer(large.scorer), request, 0, 500)
    search.begin(baseline._start_masks(request))
    offspring = list(search._offspring(200))
    assert len(set(offspring)) == len(offspring) == 200
    for mask in offspring:
        assert fits(large.memory, mask, request)
        assert not any(
            fits(large.memory, Plan(mask.removed - {i}), request) for i in sorted(mask.removed)
        )
        assert len(search.parent.removed & mask.removed) > len(search.parent.removed) / 2


def test_the_search_ends_when_no_new_mask_is_left(small):
    # One attention block suffices and any does: few masks are near, and none is tried twice.
    dense = small.memory.dense_peak_bytes(1, 1)
    choice = measure_choice(EvolutionaryBaseline(small), Request(1, 1, dense - 900), small.scorer)
    assert len(choice.plan.removed) == 1
    assert choice.evaluations < 30


def test_a_text_of_one_window_is_searched_too(small):
    small.scorer.num_windows = 1
    request = request_at(small, 8, 250, 0.8)
    choice = measure_choice(EvolutionaryBaseline(small, max_evaluations=40), request, small.scorer)
    assert choice.evaluations <= 40
    assert small.scorer.windows_run == 0


def test_setup_counts_the_evaluations_of_the_first_parents(small):
    assert EvolutionaryBaseline(small).setup_evaluations == small.gsi.evaluations

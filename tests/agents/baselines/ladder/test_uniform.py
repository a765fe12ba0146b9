"""Uniform settings: the best of all that fit, found with few measurements."""

from __future__ import annotations

import itertools

import pytest

from agents.baselines.base import CountingScorer
from agents.baselines.ladder.uniform import UniformBaseline
from rap_env.plan import Plan
from tests.agents.baselines.ladder.conftest import SHAPES
from tests.envs.playing_v1 import LEVELS


def all_settings(context, order):
    """Every uniform setting with every number of removed blocks."""
    layers = context.memory.facts.num_layers
    for weights, cache, embeddings, count in itertools.product(
        ("native", "int8", "int4"),
        ("native", *LEVELS["caches"]),
        ("native", *LEVELS["embeddings"]),
        range(2 * layers + 1),
    ):
        plan = Plan.uniform(layers, weights=weights, caches=cache, embeddings=embeddings)
        yield plan.without(*order[:count])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_best_of_all_settings_with_the_fewest_removals(
    context, item_bytes, request_at, shape, share
):
    baseline, request = UniformBaseline(context, item_bytes), request_at(shape, share)
    scores = CountingScorer(context.scorer)
    plan = baseline._choose(request, scores)
    assert scores.evaluations <= len(baseline.settings(request))
    every = list(all_settings(context, baseline._order))
    fitting = [p for p in every if context.memory.peak_bytes(p, request) <= request.budget_bytes]
    assert plan in fitting
    least = min(map(context.scorer.nll, fitting))
    # A random model may gain from further removals, which are not tried.
    assert context.scorer.nll(plan) <= least + 0.15
    assert scores.evaluations < len(fitting) / 5


def test_settings_are_not_dominated_and_sorted_by_what_is_known(context, item_bytes, request_at):
    settings = UniformBaseline(context, item_bytes).settings(request_at(SHAPES[1], 0.5))
    assert not any(one.dominates(other) for one in settings for other in settings)
    known = [one.least_delta_nll for one in settings]
    assert known == sorted(known)
    assert len({one.plan for one in settings}) == len(settings)


def test_setup_is_the_order_of_removal(context, item_bytes):
    baseline = UniformBaseline(context, item_bytes)
    assert sorted(baseline._order) == sorted(block.name for block in context.memory.facts.blocks)
    assert baseline.setup_evaluations > len(baseline._order)

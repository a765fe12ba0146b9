"""Choices from tables of measured plans: masks by their counts, and plans of a ladder."""

import pytest

from rap_env.errors import ArtifactError
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from tests.agents.synthetic import request_at
from tests.envs.playing import LEVELS
from tests.envs.tiny_contexts import make_ladder_context
from tests.masks import best_mask
from tests.policies.requests import SHAPES, fits


def test_where_losses_add_up_and_costs_are_equal_the_frontier_has_the_best_mask(context):
    for shape in [(1, 10, 0.8), (8, 250, 0.7), (16, 1000, 0.6)]:
        request = request_at(context, *shape)
        choice = make_method("frontier", context).choose(request)
        best = best_mask(context, request)
        assert context.scorer.loss(choice) == pytest.approx(context.scorer.loss(best))


def test_the_frontier_looks_up_and_scores_nothing(context):
    method, before = make_method("frontier", context), context.scorer.passes
    choice = measure_choice(method, request_at(context, 8, 250, 0.7), context.scorer)
    assert (choice.evaluations, context.scorer.passes) == (0, before)
    assert method.setup_evaluations == context.frontier.evaluations == 25


def measured(context, plans, path):
    """Write a table of plans, measured by a context."""
    scores = dict(zip(plans, context.scorer.nll_many(plans), strict=True))
    PlanTable(
        num_layers=context.memory.facts.num_layers,
        dense_nll=context.scorer.native_nll,
        scores=scores,
        evaluations_run=len(plans),
        seconds=0.0,
        settings={},
        provenance=context.scorer.provenance,
    ).save(path)
    return scores


def test_over_a_ladder_it_is_the_best_measured_plan_that_fits(ladder_bytes, between, tmp_path):
    path = tmp_path / "plans.json"
    context = make_ladder_context(frontier=str(path))
    with pytest.raises(ArtifactError, match="no frontier artifact .*plans.json"):
        make_method("frontier", context, ladder_bytes)
    layers = context.memory.facts.num_layers
    plans = [
        Plan.uniform(layers, caches=cache, weights=weights)
        for cache in ("native", *LEVELS["caches"])
        for weights in ("native", "int8", "int4")
    ]
    scores = measured(context, plans, path)
    method = make_method("frontier", context, ladder_bytes)
    assert method.setup_evaluations == len(plans)
    assert method.table_sha256 == PlanTable.load(path, context.memory).sha256
    request = between(SHAPES[1], 0.8)
    fitting = [plan for plan in plans if fits(context, plan, request)]
    assert method.choose(request) == min(fitting, key=scores.__getitem__)
    small = between(SHAPES[1], 0.05)
    knapsack = make_method("knapsack", context, ladder_bytes)
    assert method.choose(small) == knapsack.choose(small)
    assert method.evaluations == 0

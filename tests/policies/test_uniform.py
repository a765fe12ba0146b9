"""Uniform levels first, then whole blocks: without measured costs, and the best of all."""

import itertools
from dataclasses import replace

import pytest

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy, make_method
from rap_env.policies.method import CountingScorer
from rap_env.policies.uniform import middle_first, uniform_plans
from rap_env.request import Request
from tests.envs.playing import LEVELS
from tests.policies.made_policies import facts
from tests.policies.requests import SHAPES, fits


def with_levels():
    """Facts of six layers with levels: int8 half of a block's bytes, int4 a third."""
    made = facts()
    return replace(
        made,
        level_param_bytes={
            "int8": tuple(n // 2 for n in made.block_param_bytes),
            "int4": tuple(n // 3 for n in made.block_param_bytes),
        },
        level_base_bytes={"int8": 250},
        kv_bytes_per_token=(512,) * 6,
        kv_heads=(1,) * 6,
        kv_head_size=(32,) * 6,
    )


def test_plans_lower_caches_before_weights_and_embeddings_no_further_than_int8():
    plans = uniform_plans(with_levels())
    assert plans[0] == Plan()
    assert [plan.cache_level(3).name for plan in plans] == ["native", "int8", *["int4"] * 3]
    assert [plan.weight_level(7) for plan in plans] == [*["native"] * 3, "int8", "int4"]
    assert [plan.embeddings for plan in plans] == [*["native"] * 3, "int8", "int8"]


def test_a_model_without_levels_has_the_native_plan_only():
    assert uniform_plans(facts()) == [Plan()]


def test_the_most_exact_plan_that_fits_is_chosen_and_blocks_are_removed_last():
    memory = MemoryModel(with_levels())
    plans, order = uniform_plans(memory.facts), middle_first(6)
    policy = OrderPolicy(memory, order, plans)
    for plan in plans:
        need = memory.peak_bytes(plan, Request(2, 200, 1))
        assert policy.choose(Request(2, 200, need)) == plan
    without = policy.choose(Request(2, 200, need - 1))
    assert without.removed_names == ("layer04.attn",)
    assert without.weights == tuple(pair for pair in plans[-1].weights if pair[0] != 8)
    assert len(policy.choose(Request(2, 200, 1)).removed) == 12


def test_the_order_without_measurements_keeps_the_ends_longest():
    assert middle_first(4) == [4, 5, 6, 7, 2, 3, 0, 1]
    assert [sorted(middle_first(n)) for n in (1, 2)] == [[0, 1], [0, 1, 2, 3]]


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
    ladder_context, ladder_bytes, between, shape, share
):
    method, request = make_method("uniform", ladder_context, ladder_bytes), between(shape, share)
    scores = CountingScorer(ladder_context.scorer)
    plan = method._choose(request, scores)
    assert scores.evaluations <= len(method.settings(request))
    every = list(all_settings(ladder_context, method._order))
    fitting = [p for p in every if fits(ladder_context, p, request)]
    assert plan in fitting
    least = min(map(ladder_context.scorer.nll, fitting))
    # A random model may gain from further removals, which are not tried.
    assert ladder_context.scorer.nll(plan) <= least + 0.15
    assert scores.evaluations < len(fitting) / 5

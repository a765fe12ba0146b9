"""All methods, over masks and over a ladder: they fit, count and repeat their choices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from rap_env.policies.registry import methods
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at
from tests.policies.requests import SHAPES, fits, needing

SEARCHES = {"greedy_per_byte", "evolutionary", "sleb"}
ELSEWHERE = {"uniform", "score_model"}
"""Methods that need more than a fake context has, as trained policies do."""
MASKS = sorted(name for name in {*methods()} - ELSEWHERE if not name.startswith("rap"))
ALSO_SERVED = {"dense", "knapsack"}
"""Policies that the server has too: they answer every request, also one that nothing fits."""
NEVER_SURE = {"dense"}
LADDER = ["uniform", "knapsack", "random", "greedy_per_byte", "evolutionary", "gsi", "one_shot"]
GRID = list(itertools.product([(1, 10), (1, 250), (8, 250)], [0.6, 0.8, 0.95]))
LAYER_BYTES = 4004
"""Weights of an attn and an ffn block, and the cache of one token."""


def chosen(name, context, request):
    return make_method(name, context).choose(request).removed_names


def layers(*numbers):
    return Plan.removing(*(2 * n for n in numbers), *(2 * n + 1 for n in numbers))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("shape", "fraction"), GRID)
def test_budget_is_met_or_declared_unmet(context, name, shape, fraction):
    request = request_at(context, *shape, fraction)
    choice = measure_choice(make_method(name, context), request, context.scorer)
    assert choice.plan.is_mask
    assert fits(context, choice.plan, request) or name in NEVER_SURE
    assert choice.decision_s >= 0


@pytest.mark.parametrize("name", MASKS)
def test_nothing_is_removed_where_the_dense_model_fits(context, name):
    request = request_at(context, 1, 10, 1.0)
    choice = measure_choice(make_method(name, context), request, context.scorer)
    assert (choice.plan, choice.evaluations) == (Plan(), 0)


@pytest.mark.parametrize("name", sorted({*MASKS} - ALSO_SERVED))
def test_impossible_requests_are_rejected(context, name):
    method = make_method(name, context)
    with pytest.raises(InfeasibleBudgetError, match="with every block removed it still needs"):
        method.choose(Request(1, 10, 100))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        method.choose(Request(1, 5000, 10**9))


def test_a_policy_of_the_server_answers_an_impossible_request_with_its_smallest_plan(context):
    impossible = Request(1, 10, 100)
    assert make_method("dense", context).choose(impossible) == Plan()
    assert make_method("knapsack", context).choose(impossible) == Plan.removing(*range(8))


@pytest.fixture(scope="module")
def choices(ladder_context, ladder_bytes):
    """The choice of each method over the ladder at each request, made once."""
    made = {name: make_method(name, ladder_context, ladder_bytes) for name in LADDER}
    made["evolutionary"].max_evaluations = 60
    choice_of = {}

    def choose(name, request):
        if (name, request) not in choice_of:
            choice_of[name, request] = measure_choice(made[name], request, ladder_context.scorer)
        return choice_of[name, request]

    return choose


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        pytest.param(SHAPES[0], 0.15, marks=pytest.mark.slow),
        (SHAPES[1], 0.6),
        pytest.param(SHAPES[0], 0.97, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", LADDER)
def test_over_a_ladder_every_method_fits_and_counts(
    ladder_context, ladder_bytes, choices, between, name, shape, share
):
    request = between(shape, share)
    choice = choices(name, request)
    assert fits(ladder_context, choice.plan, request)
    ladder_bytes.ladder.positions(choice.plan)  # raises an error for levels that it does not have
    assert (choice.evaluations > 0) == (name in {*SEARCHES, "uniform"})


def test_a_search_is_no_worse_than_random_steps(ladder_context, choices, between):
    for shape in SHAPES:
        request = between(shape, 0.5)
        nlls = {name: ladder_context.scorer.nll(choices(name, request).plan) for name in LADDER}
        for name in ("greedy_per_byte", "evolutionary", "uniform"):
            assert nlls[name] <= nlls["random"]
        assert nlls["evolutionary"] <= min(nlls[name] for name in ("knapsack", "one_shot", "gsi"))


def test_one_shot_follows_its_order_to_the_block_that_makes_it_fit(context):
    assert chosen("one_shot", context, needing(context, 1500)) == ("layer01.attn", "layer02.attn")
    three = ("layer01.attn", "layer02.attn", "layer03.attn")
    assert chosen("one_shot", context, needing(context, 2500)) == three


def test_one_shot_per_byte_follows_the_price_of_the_request():
    # 0.04 nats for 3,000 bytes are cheaper than 0.016 for 1,004 bytes, but not for 5,000.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.016, 0.04, 0.03, 0.20])
    assert chosen("one_shot_per_byte", context, needing(context, 100)) == ("layer02.ffn",)
    long = Request(1, 1000, context.memory.native_peak_bytes(1, 1000) - 100)  # its cache counts
    assert chosen("one_shot_per_byte", context, long) == ("layer02.attn",)
    harmless = SyntheticContext([0.5, 4.0, 0.02, -0.1, 0.016, 0.04, 0.03, -0.2])
    assert chosen("one_shot_per_byte", harmless, needing(harmless, 100)) == ("layer03.ffn",)


def test_block_influence_removes_the_least_influential(context):
    context.one_shot = replace(context.one_shot, influence=(9, 9, 9, 1, 9, 9, 9, 2.0))
    expected = ("layer01.ffn", "layer03.ffn")
    assert chosen("block_influence", context, needing(context, 5000)) == expected


def test_gsi_follows_its_order_until_it_fits(context):
    context.gsi.full_order = (7, 3, 4, 0, 1, 2, 5, 6)
    assert chosen("gsi", context, needing(context, 5000)) == ("layer01.ffn", "layer03.ffn")
    three = ("layer01.ffn", "layer02.attn", "layer03.ffn")
    assert chosen("gsi", context, needing(context, 6500)) == three


def test_random_depends_on_seed_and_request_only(context, ladder_context, ladder_bytes, between):
    def plans(request, *made_of):
        return [make_method("random", *made_of, seed=n).choose(request) for n in range(10)]

    masks = plans(needing(context, 6000), context)
    assert masks == plans(needing(context, 6000), context) != plans(needing(context, 6001), context)
    assert len(set(masks)) > 5
    lowered = [plans(between(SHAPES[1], 0.8), ladder_context, ladder_bytes) for _ in range(2)]
    assert lowered[0] == lowered[1]
    assert len(set(lowered[0])) > 5


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
@pytest.mark.parametrize("fraction", [0.95, 0.8, 0.6])
def test_both_blocks_of_a_layer_are_removed_together(context, name, fraction):
    request = request_at(context, 8, 250, fraction)
    plan = make_method(name, context).choose(request)
    assert fits(context, plan, request)
    removed = {index // 2 for index in plan.removed}
    assert plan == layers(*removed) != Plan()
    fewer = [layers(*removed - {number}) for number in removed]
    assert min(context.memory.peak_bytes(plan, request) for plan in fewer) > request.budget_bytes


def test_shortgpt_follows_the_influence_of_layers(context, real_context):
    context.layer_influence = np.array([0.4, 0.3, 0.1, 0.2])
    shortgpt = make_method("shortgpt", context)
    assert shortgpt.choose(needing(context, 100)) == layers(2)
    choice = measure_choice(shortgpt, needing(context, LAYER_BYTES + 1), context.scorer)
    assert choice.plan == layers(2, 3)
    assert (choice.evaluations, shortgpt.setup_evaluations) == (0, 1)
    request = Request.at_fraction(real_context.memory, 2, 16, 0.9)
    least = int(np.argmin(real_context.layer_influence))
    assert layers(least).removed <= make_method("shortgpt", real_context).choose(request).removed


def test_costs_of_a_choice_are_counted(context):
    request = needing(context, 3900)
    greedy = make_method("greedy_per_byte", context)
    first, second = (measure_choice(greedy, request, context.scorer) for _ in range(2))
    assert len(first.plan.removed) == 2
    assert first.evaluations == second.evaluations == 1 + 8 + 7  # dense, then two scans
    assert first.decision_s < 1
    # A warm store does not shorten the reported cost.
    assert second.decision_s >= second.evaluations * context.scorer.evaluation_s
    cheap = measure_choice(make_method("one_shot", context), request, context.scorer)
    assert (cheap.evaluations, cheap.decision_s < 1) == (0, True)
    costs = {name: make_method(name, context).setup_evaluations for name in MASKS}
    assert costs["one_shot"] == costs["knapsack"] == costs["one_shot_per_byte"] == 9
    assert costs["gsi"] == costs["evolutionary"] == context.gsi.evaluations
    assert costs["random"] == costs["greedy_per_byte"] == costs["dense"] == costs["sleb"] == 0

"""All methods over a ladder on a tiny real model: they fit, count and repeat their choices."""

from __future__ import annotations

import numpy as np
import pytest

from agents.baselines import BASELINES, LADDER_BASELINES, make_baseline
from agents.baselines.base import CountingScorer, measure_choice
from agents.baselines.ladder.base import Steps
from agents.baselines.ladder.searches import LadderGreedyBaseline
from rap_env.errors import (
    ArtifactError,
    InfeasibleBudgetError,
    InvalidRequestError,
    UnknownNameError,
)
from rap_env.importance.orders import WeighedWalk
from rap_env.importance.plan_frontier import PlanFrontier
from rap_env.importance.plan_search import PlanSearchConfig, build_plan_frontier
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.baselines.ladder.conftest import SHAPES
from tests.envs.playing_v1 import LEVELS, make_ladder_context, make_v1

NAMES = sorted(set(LADDER_BASELINES) - {"rap-v0", "dense", "frontier", "score_model"})
FREE = {"random", "gsi", "one_shot", "knapsack"}
"""Methods that measure nothing per request."""


@pytest.fixture(scope="module")
def chosen(context, item_bytes):
    """The choice of each method at each request, made once."""
    made = {name: make_baseline(name, context, 0, item_bytes) for name in NAMES}
    if "evolutionary" in made:
        made["evolutionary"].max_evaluations = 60
    found = {}

    def choose(name, request):
        if (name, request) not in found:
            found[name, request] = measure_choice(made[name], request, context.scorer)
        return found[name, request]

    return choose


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        pytest.param(SHAPES[0], 0.15, marks=pytest.mark.slow),
        (SHAPES[1], 0.6),
        pytest.param(SHAPES[0], 0.97, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "beam" else []) for n in NAMES]
)
def test_every_method_fits_and_counts(context, item_bytes, chosen, request_at, name, shape, share):
    request = request_at(shape, share)
    choice = chosen(name, request)
    assert context.memory.peak_bytes(choice.plan, request) <= request.budget_bytes
    item_bytes.ladder.positions(choice.plan)  # raises an error for levels that it does not have
    assert (choice.evaluations == 0) == (name in FREE)


@pytest.mark.parametrize("name", [*NAMES, "dense"])
def test_nothing_is_lowered_where_the_native_model_fits(context, item_bytes, name):
    native = context.memory.dense_peak_bytes(2, 100)
    choice = make_baseline(name, context, 0, item_bytes)
    assert choice.choose(Request(2, 100, native)) == Plan()
    assert choice.evaluations == 0


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_budgets_below_the_lowest_levels_are_rejected(context, item_bytes, name):
    least = item_bytes.costs(2, 100).least_peak_bytes
    with pytest.raises(InfeasibleBudgetError, match="No levels of tiny-llama in this ladder fit"):
        make_baseline(name, context, 0, item_bytes).choose(Request(2, 100, least - 1))


def test_names_are_those_of_the_methods_over_masks(context, item_bytes):
    others = {"uniform", "rap-v0", "greedy_per_byte-exact", "score_model"}
    assert set(LADDER_BASELINES) - set(BASELINES) == others
    with pytest.raises(UnknownNameError, match="Did you mean 'knapsack'"):
        make_baseline("knapsac", context, 0, item_bytes)


def test_a_search_is_no_worse_than_random_steps(context, chosen, request_at):
    for shape in SHAPES:
        request = request_at(shape, 0.5)
        losses = {name: context.scorer.nll(chosen(name, request).plan) for name in NAMES}
        for name in ("greedy_per_byte", "evolutionary", "beam", "uniform"):
            assert losses[name] <= losses["random"]
        starts = [losses[name] for name in ("knapsack", "one_shot", "gsi")]
        assert losses["evolutionary"] <= min(starts)


def test_random_steps_depend_on_the_seed(context, item_bytes, request_at):
    def plans():
        made = [make_baseline("random", context, seed, item_bytes) for seed in range(5)]
        return [baseline.choose(request_at(SHAPES[1], 0.8)) for baseline in made]

    assert plans() == plans()
    assert len(set(plans())) > 2


def test_greedy_takes_the_least_measured_price_per_useful_byte(context, item_bytes, request_at):
    """Against a plain loop over all items."""
    request = request_at(SHAPES[1], 0.7)
    costs, ladder = item_bytes.costs(*SHAPES[1]), item_bytes.ladder
    state, scorer = costs.state(), context.scorer
    while state.peak_bytes > request.budget_bytes:
        nll, needed = scorer.nll(ladder.plan(state.positions)), state.peak_bytes
        needed -= request.budget_bytes
        prices = {}
        for item in filter(state.is_valid, range(len(ladder))):
            freed = sum(map(state.freed_bytes, state.companions(item)))
            rise = scorer.nll(ladder.plan(state.positions_after(item))) - nll
            if freed > 0:
                prices[item] = rise if rise <= 0 else rise / min(freed, needed)
        state.lower(min(prices, key=prices.__getitem__))
    exact = make_baseline("greedy_per_byte-exact", context, 0, item_bytes)
    plan = exact.choose(request)
    assert scorer.nll(plan) == pytest.approx(scorer.nll(ladder.plan(state.positions)))
    lazy = make_baseline("greedy_per_byte", context, 0, item_bytes)
    lazy.choose(request)
    assert lazy.evaluations < exact.evaluations


def test_greedy_shares_the_first_steps_of_smaller_budgets(context, item_bytes, request_at):
    class Steady(LadderGreedyBaseline):
        """Counts what was really run."""

    baseline, scorer = Steady(context, item_bytes), context.scorer
    first = request_at((15, 500), 0.7)
    baseline.choose(first)
    before = scorer.evaluations
    counted = baseline.evaluations
    baseline.choose(request_at((15, 500), 0.65))
    assert scorer.evaluations - before < baseline.evaluations - counted


def test_predicted_rises_are_those_of_the_greedy_order(context, item_bytes):
    costs, ladder = context.level_costs(LEVELS["caches"]), item_bytes.ladder
    found = Steps(context, item_bytes.costs(16, 500))
    state, walk = found.state(), WeighedWalk(costs, item_bytes)
    for item in (ladder.numbers["layer00.cache"], 0, 0, 0, 1):  # the first block is removed
        rises = {one.step[0]: one.rise for one in found.candidates(state)}
        for number, rise in rises.items():
            assert rise == pytest.approx(walk.rise(number, walk.next_of(number)))
        state.lower(item)
        walk.lower(item)


def test_a_measured_rise_replaces_the_predicted_one(context, item_bytes):
    steps = Steps(context, item_bytes.costs(16, 500))
    scores, state = CountingScorer(context.scorer), steps.state()
    first, *others = steps.candidates(state)
    nll = scores.nll(Plan())
    (after,) = steps.measure(scores, nll, [first]).values()
    assert steps.candidates(state)[0].rise == after - nll
    assert [one.rise for one in steps.candidates(state)[1:]] == [one.rise for one in others]


def test_the_knapsack_keeps_to_the_levels_of_the_ladder(context, request_at):
    facts = context.memory.facts
    few = {"weights": ["int8", "removed"], "caches": ["int4"]}
    narrow = LadderBytes(context.memory, Ladder.of(facts, few))
    for share in (0.2, 0.5):
        request = request_at(SHAPES[1], share)
        plan = make_baseline("knapsack", context, 0, narrow).choose(request)
        narrow.ladder.positions(plan)
        assert set(plan.levels.values()) <= {"int8", "removed", "int4"}
        assert plan.embeddings == "native"


def test_the_frontier_is_the_best_measured_plan_that_fits(item_bytes, request_at, tmp_path):
    path = tmp_path / "plans.json"
    context = make_ladder_context(frontier=str(path))
    with pytest.raises(ArtifactError, match="no table of measured plans .*plans.json"):
        make_baseline("frontier", context, 0, item_bytes)
    layers = context.memory.facts.num_layers
    plans = [
        Plan.uniform(layers, caches=cache, weights=weights)
        for cache in ("native", *LEVELS["caches"])
        for weights in ("native", "int8", "int4")
    ]
    scores = dict(zip(plans, context.scorer.nll_many(plans), strict=True))
    PlanFrontier(
        num_layers=layers,
        native_nll=context.scorer.dense_nll,
        scores=scores,
        evaluations_run=len(plans),
        seconds=0.0,
        settings={},
        provenance=context.scorer.provenance,
    ).save(path)
    baseline = make_baseline("frontier", context, 0, item_bytes)
    assert baseline.setup_evaluations == len(plans)
    assert baseline.table_sha256 == PlanFrontier.load(path, context.memory).sha256
    request = request_at(SHAPES[1], 0.8)
    peaks = {plan: context.memory.peak_bytes(plan, request) for plan in plans}
    fitting = [plan for plan in plans if peaks[plan] <= request.budget_bytes]
    assert baseline.choose(request) == min(fitting, key=scores.__getitem__)
    small = request_at(SHAPES[1], 0.05)
    knapsack = make_baseline("knapsack", context, 0, item_bytes)
    assert baseline.choose(small) == knapsack.choose(small)
    assert baseline.evaluations == 0


@pytest.mark.slow
def test_a_search_on_predicted_scores_runs_no_model_and_beats_the_greedy_order(
    item_bytes, request_at, tmp_path
):
    path = tmp_path / "plans.json"
    context = make_ladder_context(frontier=str(path))
    requests = [request_at(shape, n / 20) for shape in SHAPES for n in range(1, 19)]
    build_plan_frontier(
        context.scorer,
        context.level_costs(item_bytes.ladder.cache_levels),
        item_bytes,
        requests,
        PlanSearchConfig(evaluations=120, batch=12, requests=12, members=2),
    ).save(path)
    made = {n: make_baseline(n, context, 0, item_bytes) for n in ("score_model", "one_shot")}
    ran = context.scorer.evaluations
    plans = {name: [one.choose(request) for request in requests] for name, one in made.items()}
    assert made["score_model"].evaluations == 0
    assert context.scorer.evaluations == ran
    where = np.array([item_bytes.ladder.positions(plan) for plan in plans["score_model"]])
    assert item_bytes.ladder.reaches(where).all()
    for plan, request in zip(plans["score_model"], requests, strict=True):
        assert context.memory.peak_bytes(plan, request) <= request.budget_bytes
    means = {name: np.mean(context.scorer.nll_many(found)) for name, found in plans.items()}
    assert means["score_model"] < means["one_shot"]


def test_a_reward_may_be_relative_to_the_best_measured_plan(item_bytes, tmp_path):
    path = tmp_path / "plans.json"
    context = make_ladder_context(frontier=str(path))
    low = Plan.uniform(context.memory.facts.num_layers, caches="int4", weights="int4")
    plans = [Plan(), low]
    scores = dict(zip(plans, context.scorer.nll_many(plans), strict=True))
    layers, native = context.memory.facts.num_layers, context.scorer.dense_nll
    PlanFrontier(layers, native, scores, 2, 0.0, {}, context.scorer.provenance).save(path)
    peak_bytes = context.memory.peak_bytes(low, Request(16, 500, 1))
    env = make_v1(
        context, reward={"name": "perplexity", "relative_to": "frontier", "timing": "terminal"}
    )
    info = play_lowest(env, Request(16, 500, peak_bytes))
    assert info["baseline_loss"] == pytest.approx(scores[low] - native)
    with pytest.raises(InvalidRequestError, match="No plan of the frontier fits"):
        play_lowest(env, Request(16, 500, peak_bytes - 1))


def play_lowest(env, request):
    """Lower the first item that can be lowered until the request fits."""
    env.reset(seed=0, options={"request": request})
    done = False
    while not done:
        _, _, done, _, info = env.step(int(np.flatnonzero(env.action_masks())[0]))
    return info

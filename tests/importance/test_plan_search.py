"""The search for plans: its moves are those of v1, and what it finds is measured and better."""

import itertools

import numpy as np
import pytest
import torch

from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.one_shot import one_shot
from rap_env.importance.orders import greedy_order, one_shot_costs
from rap_env.importance.plan_search import (
    PlanPredictor,
    PlanSearch,
    PlanSearchConfig,
    build_plan_table,
    lowered_plans,
)
from rap_env.importance.plan_table import PlanTable
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.predictor_fit import feature_matrix, fit_score_model, lowered_costs
from rap_env.scoring.scorer import PlanScorer
from tests.envs.tiny_contexts import make_ladder_context

CACHES = ("int8", "int4", "int4-window32")
TOGETHER = ("int8", "int4")


@pytest.fixture(scope="module")
def context():
    return make_ladder_context(importance="one_shot")


@pytest.fixture(scope="module")
def ladder_bytes(context):
    levels = {"weights": ("int8", "int4", "removed"), "caches": CACHES, "embeddings": ("int8",)}
    return LadderBytes(context.memory, Ladder.of(context.memory.facts, levels, TOGETHER))


def requests(ladder_bytes, count=24):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        batch, tokens = int(rng.choice([1, 4])), int(rng.integers(20, 400))
        costs = ladder_bytes.costs(batch, tokens)
        low, high = costs.least_peak_bytes, costs.native_peak_bytes
        found.append(Request(batch, tokens, int(rng.integers(low, high))))
    return found


def test_moves_down_are_the_actions_of_the_ladder(ladder_bytes):
    ladder, costs = ladder_bytes.ladder, ladder_bytes.costs(2, 300)
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = costs.state()
        for _ in range(rng.integers(0, 9)):
            valid = [item for item in range(len(ladder)) if state.is_valid(item)]
            state.lower(int(rng.choice(valid)))
        plans, parents, items = lowered_plans(costs, np.array([state.positions] * 2))
        expected = {
            tuple(state.positions_after(item))
            for item in range(len(ladder))
            if state.is_valid(item)
        }
        assert {tuple(row) for row in plans[parents == 0].tolist()} == expected
        assert np.array_equal(plans[parents == 0], plans[parents == 1])
        assert len(plans[parents == 0]) == len(expected), "no plan twice"
        assert [state.positions_after(item) for item in items.tolist()] == plans.tolist()


def test_improving_keeps_the_budget_and_never_makes_a_plan_worse(context, ladder_bytes):
    ladder = ladder_bytes.ladder
    costs = context.level_costs(ladder)
    scorer = context.scorer
    order = greedy_order(costs, ladder_bytes)
    plans = [Plan(), *(Plan.removing(index) for index in range(6))]
    for request in requests(ladder_bytes):
        found = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        plans.append(found.lower_until_fits(order.steps, request.budget_bytes))
    plans = list(dict.fromkeys(plans))
    nll = np.array(scorer.nll_many(plans)) - scorer.native_nll
    model, _ = fit_score_model(
        feature_matrix(plans, 6), nll, nll[1:7], lowered_costs(plans, costs.delta_nll), members=2
    )
    predictor = PlanPredictor(ladder, one_shot_costs(costs, ladder), model)
    where = np.array([ladder.positions(plan) for plan in plans])
    expected = model.delta_nll_many(
        feature_matrix(plans, 6), lowered_costs(plans, costs.delta_nll), clamped=False
    )
    assert np.allclose(predictor.delta_nll(where), expected, atol=1e-6)
    cheap = PlanPredictor(ladder, np.full((len(ladder), ladder.width), -1.0), model)
    lowered = np.array([ladder.positions(Plan.uniform(3, caches="int4"))])
    assert cheap.delta_nll(lowered) == [0.0], "levels that lower the NLL count as free"
    better = 0
    for request in requests(ladder_bytes):
        found = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        below = lowered_plans(found, where)
        assert np.allclose(predictor.delta_nll_below(where, *below), predictor.delta_nll(below[0]))
        search = PlanSearch(predictor, found, request.budget_bytes)
        start = np.array(
            ladder.positions(found.lower_until_fits(order.steps, request.budget_bytes))
        )
        improved, value = search.improve(start)
        assert found.peaks(improved[None])[0] <= request.budget_bytes
        assert value <= predictor.delta_nll(start[None])[0] + 1e-9
        assert value == pytest.approx(predictor.delta_nll(improved[None])[0])
        better += value < predictor.delta_nll(start[None])[0] - 1e-6
    assert better


def test_a_search_takes_in_what_is_known_and_improves_on_the_greedy_order(context, ladder_bytes):
    costs = context.level_costs(ladder_bytes.ladder)
    wanted = requests(ladder_bytes)
    other = ladder_bytes.ladder.lowest
    known = {other: context.scorer.nll(other)}
    elsewhere = {Plan.of({"layer00.cache": "int2"}): 9.0}
    config = PlanSearchConfig(evaluations=70, batch=8, requests=8, members=2)
    seen = []
    found = build_plan_table(
        context.scorer, costs, ladder_bytes, wanted, config, known | elsewhere, seen.append
    )
    assert isinstance(found, PlanTable)
    assert found.evaluations <= 70
    assert found.scores[other] == known[other]
    assert not elsewhere.keys() & found.scores.keys(), "the ladder has no int2"
    assert set(seen) <= set(found.scores)
    assert found.scores == {plan: context.scorer.nll(plan) for plan in found.scores}
    table, order = found.on(ladder_bytes.ladder), greedy_order(costs, ladder_bytes)
    gains = []
    for request in wanted:
        bytes_of = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        greedy = bytes_of.lower_until_fits(order.steps, request.budget_bytes)
        best = table.best(bytes_of, request.budget_bytes)
        gains.append(context.scorer.nll(greedy) - found.scores[best])
    assert np.mean(gains) > 0
    again = build_plan_table(context.scorer, costs, ladder_bytes, wanted, config, known)
    assert again.scores == found.scores, "the search is deterministic given the scores"


def test_a_search_starts_from_the_best_plans_of_another_table(context, ladder_bytes):
    costs, (request, *_) = context.level_costs(ladder_bytes.ladder), requests(ladder_bytes)
    rng, ladder = np.random.default_rng(3), ladder_bytes.ladder
    spaces = [range(len(item.levels)) for item in ladder.items]
    drawn = [ladder.plan([int(rng.choice(s)) for s in spaces]) for _ in range(40)]
    bytes_of = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
    peaks = bytes_of.peaks(np.array([ladder.positions(plan) for plan in drawn]))
    roomy = Request(request.batch_size, request.seq_len_tokens, int(np.median(peaks)))
    scores = {plan: 3.0 - number / 100 for number, plan in enumerate(drawn)}
    start = PlanTable(context.memory.facts.num_layers, 2.0, scores, 40, 0.0, {}, {})
    best = start.on(ladder).best(bytes_of, roomy.budget_bytes)
    blocks = context.memory.facts.num_blocks
    config = PlanSearchConfig(evaluations=blocks + 2, batch=1, members=2)
    found = build_plan_table(context.scorer, costs, ladder_bytes, [roomy], config, start=start)
    assert best in found.scores
    assert found.scores[best] == context.scorer.nll(best), "measured, not taken over"


def test_a_text_that_is_shorter_than_the_windows_of_the_ladder_can_be_searched_on():
    """There a window costs what its precision costs, and plans with it are measured as others."""
    short = make_ladder_context(length=64, importance="one_shot")
    ladder = Ladder.of(short.memory.facts, {"weights": ("removed",), "caches": CACHES}, TOGETHER)
    costs, ladder_bytes = short.level_costs(ladder), LadderBytes(short.memory, ladder)
    assert "int4-window32" not in costs.costs["layer00.cache"]
    config = PlanSearchConfig(evaluations=30, batch=8, requests=8, members=2)
    found = build_plan_table(short.scorer, costs, ladder_bytes, requests(ladder_bytes), config)
    with_windows = [plan for plan in found.scores if "window32" in str(plan)]
    assert with_windows
    for plan in with_windows:
        assert found.scores[plan] == short.scorer.nll(plan)


@pytest.mark.slow
def test_a_search_over_masks_is_near_optimal():
    """In a trained model of ten blocks, whose 1,024 masks are all measured."""
    torch.set_num_threads(1)
    llm = shared_llm("tiny-even", device="cpu", dtype="float32")
    text = CorpusConfig(source="tiny-held-out", windows=2, window_tokens=128)
    scorer, memory, rng = (
        PlanScorer(llm, load_corpus(text, llm)),
        MemoryModel(llm),
        np.random.default_rng(0),
    )
    costs = LevelCosts.of_removals(one_shot(scorer, progress=False))
    asked = [
        Request.at_fraction(
            memory, int(rng.choice([1, 4])), int(rng.choice([16, 64])), rng.uniform(0.4, 0.95)
        )
        for _ in range(128)
    ]
    ladder_bytes = LadderBytes(memory, Ladder.of(llm.facts, "masks"))
    config = PlanSearchConfig(evaluations=150, requests=32, members=3)
    found = build_plan_table(scorer, costs, ladder_bytes, asked, config)
    assert found.evaluations <= 150
    blocks = range(llm.num_blocks)
    masks = [
        Plan.removing(*removed)
        for count in range(len(blocks) + 1)
        for removed in itertools.combinations(blocks, count)
    ]
    nlls = scorer.nll_many(masks)
    known, order = found.on(ladder_bytes.ladder), greedy_order(costs, ladder_bytes).steps
    every_position = np.array([ladder_bytes.ladder.positions(mask) for mask in masks])
    chosen, best, followed = [], [], []
    for request in asked[:24]:
        bytes_of = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        peaks = bytes_of.peaks(every_position)
        fits = [nll for nll, peak in zip(nlls, peaks, strict=True) if peak <= request.budget_bytes]
        if fits:
            chosen.append(scorer.nll(known.best(bytes_of, request.budget_bytes)))
            best.append(min(fits))
            followed.append(scorer.nll(bytes_of.lower_until_fits(order, request.budget_bytes)))
    gained = (np.mean(followed) - np.mean(chosen)) / (np.mean(followed) - np.mean(best))
    assert 0.7 < gained <= 1

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents.baselines import BASELINES, make_baseline
from agents.baselines.base import fits, measure_choice
from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    UnknownNameError,
)
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, facts, request_at

# attn, ffn of layers 0 to 3; an ffn block frees 3,000 bytes, an attn block 1,000 and its cache.
COSTS = [0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20]
GRID = list(itertools.product([(1, 10), (1, 250), (8, 250)], [0.6, 0.8, 0.95]))
FITTING = set(BASELINES) - {"dense", "attention_only", "ffn_only"}
SEARCHES = ("greedy_per_byte", "evolutionary", "beam", "greedy_swaps", "oracle", "sleb")


@pytest.fixture
def context():
    return SyntheticContext(COSTS)


def needing(context, bytes_over, seq_len_tokens=1):
    """A short request that is over its budget by so many bytes."""
    dense = context.memory.dense_peak_bytes(1, seq_len_tokens)
    return Request(1, seq_len_tokens, dense - bytes_over)


def chosen(name, context, request):
    return make_baseline(name, context).choose(request).names


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("shape", "fraction"), GRID)
def test_budget_is_met_or_declared_unmet(context, name, shape, fraction):
    request = request_at(context, *shape, fraction)
    choice = measure_choice(make_baseline(name, context), request, context.scorer)
    peak = context.memory.peak_bytes(choice.plan, request)
    assert peak <= request.budget_bytes or name not in FITTING
    assert choice.decision_s >= 0


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_is_removed_where_the_dense_model_fits(context, name):
    request = request_at(context, 1, 10, 1.0)
    choice = measure_choice(make_baseline(name, context), request, context.scorer)
    assert choice.plan == Plan()
    assert fits(context.memory, choice.plan, request)
    assert choice.evaluations == 0


def test_one_shot_follows_its_order_to_the_block_that_makes_it_fit(context):
    assert chosen("one_shot", context, needing(context, 1500)) == ("layer01.attn", "layer02.attn")
    assert chosen("one_shot", context, needing(context, 2500)) == (
        "layer01.attn",
        "layer02.attn",
        "layer03.attn",
    )


def test_one_shot_per_byte_follows_the_price_of_the_request():
    # 0.04 nats for 3,000 bytes are cheaper than 0.016 for 1,004 bytes, but not for 5,000.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.016, 0.04, 0.03, 0.20])
    baseline = make_baseline("one_shot_per_byte", context)
    assert baseline.choose(needing(context, 100)).names == ("layer02.ffn",)
    long = Request(1, 1000, context.memory.dense_peak_bytes(1, 1000) - 100)  # its cache counts
    assert baseline.choose(long).names == ("layer02.attn",)
    harmless = SyntheticContext([0.5, 4.0, 0.02, -0.1, 0.016, 0.04, 0.03, -0.2])
    first = make_baseline("one_shot_per_byte", harmless)
    assert first.choose(needing(harmless, 100)).names == ("layer03.ffn",)


def test_block_influence_removes_the_least_influential(context):
    context.one_shot.block_influence = np.array([9, 9, 9, 1, 9, 9, 9, 2.0])
    expected = ("layer01.ffn", "layer03.ffn")
    assert chosen("block_influence", context, needing(context, 5000)) == expected


def test_gsi_follows_its_order_until_it_fits(context):
    context.gsi.full_order = (7, 3, 4, 0, 1, 2, 5, 6)
    assert chosen("gsi", context, needing(context, 5000)) == ("layer01.ffn", "layer03.ffn")
    assert chosen("gsi", context, needing(context, 6500)) == (
        "layer01.ffn",
        "layer02.attn",
        "layer03.ffn",
    )


def test_one_kind_baselines_remove_only_that_kind_and_may_not_fit(context):
    modest, large = needing(context, 3500), needing(context, 7500)
    only_attn = make_baseline("attention_only", context)
    assert only_attn.choose(modest).count_removed("ffn") == 0
    assert fits(context.memory, only_attn.choose(modest), modest)
    assert only_attn.choose(large) == Plan.removing(0, 2, 4, 6)
    assert not fits(context.memory, only_attn.choose(large), large)
    only_ffn = make_baseline("ffn_only", context).choose(large)
    assert only_ffn == Plan.removing("layer02.ffn", "layer03.ffn", "layer01.ffn")
    assert fits(context.memory, only_ffn, large)


def test_dense_is_declared_unmet(context):
    request = needing(context, 1)
    mask = make_baseline("dense", context).choose(request)
    assert mask == Plan()
    assert not fits(context.memory, mask, request)
    assert not BASELINES["dense"].kv_aware
    assert all(kind.kv_aware for name, kind in BASELINES.items() if name != "dense")


def test_random_depends_on_seed_and_request_only(context):
    request, other = needing(context, 6000), needing(context, 6001)
    masks = [make_baseline("random", context, seed).choose(request) for seed in range(20)]
    again = [make_baseline("random", context, seed).choose(request) for seed in range(20)]
    assert masks == again
    assert len(set(masks)) > 10
    assert masks != [make_baseline("random", context, s).choose(other) for s in range(20)]


def test_greedy_prefers_loss_per_byte():
    # 0.02 nats for 3,000 bytes are cheaper than 0.01 for 1,004.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.3, 0.01, 0.02, 0.03, 0.2])
    assert chosen("greedy_per_byte", context, needing(context, 3000)) == ("layer02.ffn",)
    assert chosen("one_shot", context, needing(context, 3000))[0] == "layer01.attn"


def test_greedy_last_step_takes_the_least_loss_that_suffices():
    # Per byte layer02.ffn is cheapest, but an attention block suffices at less loss.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.3, 0.01, 0.02, 0.03, 0.2])
    assert chosen("greedy_per_byte", context, needing(context, 900)) == ("layer02.attn",)


def test_greedy_measures_again_after_each_removal():
    # Neighbours that are each cheap are dear together: one-shot takes both, greedy does not.
    costs = [1.0, 5.0, 0.10, 3.0, 0.11, 3.0, 0.30, 3.0]
    context = SyntheticContext(costs)
    context.scorer.pairs[2, 4] = context.scorer.pairs[4, 2] = 2.0
    request = needing(context, 1500)
    assert chosen("one_shot", context, request) == ("layer01.attn", "layer02.attn")
    assert chosen("greedy_per_byte", context, request) == ("layer01.attn", "layer03.attn")


def test_greedy_takes_a_removal_that_lowers_the_loss_first():
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, 0.01, 0.04, 0.03, 0.2])
    assert "layer01.attn" in chosen("greedy_per_byte", context, needing(context, 3500))


def test_costs_of_a_choice_are_counted(context):
    request = needing(context, 3900)
    greedy = make_baseline("greedy_per_byte", context)
    first, second = (
        measure_choice(greedy, request, context.scorer),
        measure_choice(greedy, request, context.scorer),
    )
    assert len(first.plan.removed) == 2
    assert first.evaluations == second.evaluations == 1 + 8 + 7  # dense, then two scans
    assert (
        measure_choice(make_baseline("one_shot", context), request, context.scorer).evaluations == 0
    )
    costs = {name: make_baseline(name, context).setup_evaluations for name in BASELINES}
    assert costs["one_shot"] == costs["knapsack"] == costs["one_shot_per_byte"] == 9
    assert costs["gsi"] == context.gsi.evaluations
    assert costs["random"] == costs["greedy_per_byte"] == costs["dense"] == 0


def test_the_kv_cache_decides_which_kind_is_removed():
    context = SyntheticContext([0.1] * 8, facts(layers=4))
    greedy = make_baseline("greedy_per_byte", context)
    short, long = needing(context, 5900), request_at(context, 16, 1000, 0.8)
    assert greedy.choose(short) == Plan.removing("layer00.ffn", "layer01.ffn")
    assert greedy.choose(long) == Plan.removing("layer00.attn")


def test_unknown_baseline_lists_the_known(context):
    with pytest.raises(UnknownNameError, match="Unknown baseline 'gsy'.*Did you mean 'gsi'"):
        make_baseline("gsy", context)


@pytest.mark.parametrize("name", BASELINES)
def test_impossible_requests_are_rejected(context, name):
    baseline = make_baseline(name, context)
    with pytest.raises(InfeasibleBudgetError, match="with every block removed"):
        baseline.choose(Request(1, 10, 100))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        baseline.choose(Request(1, 5000, 10**9))


@pytest.mark.parametrize("name", BASELINES)
def test_on_a_real_model(real_context, name):
    request = Request.at_fraction(real_context.memory, 2, 16, 0.8)
    baseline = make_baseline(name, real_context)
    choice = measure_choice(baseline, request, real_context.scorer)
    assert name != "dense" or not fits(real_context.memory, choice.plan, request)
    assert choice.evaluations == 0 or name in SEARCHES
    if name in FITTING:
        peak = real_context.memory.peak_bytes(choice.plan, request)
        assert peak <= request.budget_bytes


def test_a_warm_store_does_not_shorten_the_reported_search_cost(context):
    greedy, request = make_baseline("greedy_per_byte", context), needing(context, 5000)
    first, again = (
        measure_choice(greedy, request, context.scorer),
        measure_choice(greedy, request, context.scorer),
    )
    assert again.plan == first.plan
    assert first.decision_s < 1
    assert again.decision_s >= again.evaluations * context.scorer.evaluation_s
    assert (
        measure_choice(make_baseline("one_shot", context), request, context.scorer).decision_s < 1
    )


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("shape", "fraction"), [((1, 8), 0.9), ((8, 64), 0.8), ((8, 64), 0.7)])
def test_bytes_of_stubs_count_on_a_repaired_model(repaired_context, name, shape, fraction):
    memory = repaired_context.memory
    request = Request.at_fraction(memory, *shape, fraction)
    mask = make_baseline(name, repaired_context).choose(request)
    parts = memory.breakdown(mask, request)
    assert parts.stubs == sum(memory.facts.stub_bytes[index] for index in mask)
    assert fits(repaired_context.memory, mask, request) == (parts.peak <= request.budget_bytes)
    if name in FITTING:
        assert fits(repaired_context.memory, mask, request)
        assert parts.stubs > 0
        assert mask


def test_a_budget_that_the_stubs_alone_exceed_takes_one_more_block(real_context, repaired_context):
    """Without stubs two blocks would do; what they leave behind makes it three."""
    order = make_baseline("one_shot", repaired_context)._blocks
    mask = Plan.removing(*order[:2])
    shape = (1, 8)
    plain = real_context.memory.peak_bytes(mask, Request(*shape, 1))
    request = Request(*shape, plain)
    assert make_baseline("one_shot", repaired_context).choose(request) == Plan.removing(*order[:3])


def test_greedy_per_byte_scores_masks_with_their_stubs(repaired_context):
    request = Request.at_fraction(repaired_context.memory, 8, 64, 0.95)
    freed = repaired_context.memory.freed_bytes(request)
    dense, scan = repaired_context.scorer.dense_nll, repaired_context.scorer.scan(Plan())
    over = repaired_context.memory.dense_peak_bytes(8, 64) - request.budget_bytes
    prices = {
        block.index: (nll - dense) / min(freed[block.index], over) if nll > dense else nll - dense
        for block, nll in scan.items()
    }
    chosen = make_baseline("greedy_per_byte", repaired_context).choose(request)
    assert min(prices, key=prices.get) in chosen

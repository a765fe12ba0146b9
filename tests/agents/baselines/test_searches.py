"""Searches that start with greedy removal and look further than it does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents.baselines import BASELINES, make_baseline
from agents.baselines.base import fits, measure_choice
from agents.baselines.searches import (
    MOST_BLOCKS,
    BeamBaseline,
    GreedyPerByteBaseline,
    GreedySwapsBaseline,
    OracleBaseline,
    whole_layer,
)
from rap_env.errors import SearchTooLargeError
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at

REQUESTS = [(1, 10, 0.7), (8, 250, 0.8), (16, 1000, 0.6), (1, 250, 0.5)]


def trap():
    """The cheapest single block is expensive in combination; greedy takes it first and keeps it."""
    context = SyntheticContext([0.10, 9.0, 0.11, 9.0, 0.12, 9.0, 0.90, 9.0])
    for other in (2, 4, 6):
        context.scorer.pairs[0, other] = context.scorer.pairs[other, 0] = 1.0
    return context


def needing(context, bytes_over):
    return Request(1, 1, context.memory.dense_peak_bytes(1, 1) - bytes_over)


@pytest.fixture
def large():
    rng = np.random.default_rng(4)
    return SyntheticContext(rng.lognormal(-3, 1, 24), interaction=3.0)


@pytest.mark.parametrize("name", ["beam", "greedy_swaps", "evolutionary"])
def test_beam_search_escapes_the_greedy_local_optimum(name):
    context = trap()
    request = needing(context, 1500)  # two attention blocks
    assert 0 in make_baseline("greedy_per_byte", context).choose(request)
    mask = make_baseline(name, context).choose(request)
    assert mask == Plan.removing("layer01.attn", "layer02.attn")


def test_a_beam_of_one_stays_in_the_greedy_local_optimum():
    context = trap()
    request = needing(context, 1500)
    assert 0 in BeamBaseline(context, width=1).choose(request).removed
    assert 0 not in BeamBaseline(context, width=2).choose(request).removed


def test_beam_counts_every_mask_once():
    context = trap()
    choice = measure_choice(BeamBaseline(context, width=2), needing(context, 1500), context.scorer)
    # The dense model, 8 blocks, then 7 more behind each of two blocks, one pair being the same.
    assert choice.evaluations == 1 + 8 + 7 + 7 - 1 == context.scorer.evaluations
    again = measure_choice(BeamBaseline(context, width=2), needing(context, 1500), context.scorer)
    assert (again.plan, again.evaluations) == (choice.plan, choice.evaluations)
    assert again.decision_s > context.scorer.evaluation_s * again.evaluations


def test_beam_counts_useful_bytes_only():
    # Per byte layer02.ffn is cheapest, but an attention block suffices at less loss.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.3, 0.01, 0.02, 0.03, 0.2])
    assert BeamBaseline(context).choose(needing(context, 900)) == Plan.removing("layer02.attn")
    assert BeamBaseline(context).choose(needing(context, 3000)) == Plan.removing("layer02.ffn")


def test_beam_returns_the_best_mask_seen():
    """A removal that lowers the loss is taken though the request fits without it."""
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, 0.01, 0.04, 0.03, 0.2])
    assert "layer01.attn" in BeamBaseline(context).choose(needing(context, 3500)).removed_names


@pytest.mark.parametrize("shape", REQUESTS)
def test_a_wider_beam_scores_more(large, shape):
    request = request_at(large, *shape)
    narrow, wide = (
        measure_choice(BeamBaseline(large, width=width), request, large.scorer) for width in (1, 4)
    )
    assert fits(large.memory, narrow.plan, request)
    assert fits(large.memory, wide.plan, request)
    assert narrow.evaluations < wide.evaluations <= 4 * narrow.evaluations


@pytest.mark.parametrize("shape", REQUESTS)
def test_swaps_end_where_no_swap_helps(large, shape):
    request = request_at(large, *shape)
    choice = GreedySwapsBaseline(large, extra_evaluations=10**6).choose(request)
    greedy = GreedyPerByteBaseline(large).choose(request)
    assert large.scorer.loss(choice) <= large.scorer.loss(greedy)
    kept = [index for index in range(24) if index not in choice.removed]
    for removed in sorted(choice.removed):
        fewer = Plan(choice.removed - {removed})
        for near in (fewer, *(fewer.without(index) for index in kept)):
            if fits(large.memory, near, request):
                assert large.scorer.loss(near) >= large.scorer.loss(choice)


@pytest.mark.parametrize("extra", [0, 5, 40])
def test_swaps_keep_their_budget(large, extra):
    request = request_at(large, 1, 10, 0.7)
    greedy = measure_choice(GreedyPerByteBaseline(large), request, large.scorer)
    choice = measure_choice(
        GreedySwapsBaseline(large, extra_evaluations=extra), request, large.scorer
    )
    assert choice.evaluations <= greedy.evaluations + extra
    assert fits(large.memory, choice.plan, request)
    if not extra:
        assert (choice.plan, choice.evaluations) == (greedy.plan, greedy.evaluations)


def test_swaps_count_what_greedy_scored_once(large):
    request = request_at(large, 1, 10, 0.7)
    choice = measure_choice(GreedySwapsBaseline(large), request, large.scorer)
    assert choice.evaluations == large.scorer.evaluations
    assert choice.decision_s < large.scorer.evaluation_s  # all of it was run just now


SHAPES = [(2, 16, 0.85), (8, 64, 0.8), (8, 64, 0.7)]


def all_masks(blocks):
    for removed in itertools.product([False, True], repeat=blocks):
        yield Plan.removing(*(index for index, gone in enumerate(removed) if gone))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_is_the_best_of_all_masks_of_a_real_model(real_context, shape):
    request = Request.at_fraction(real_context.memory, *shape)
    masks = [m for m in all_masks(6) if fits(real_context.memory, m, request)]
    choice = measure_choice(make_baseline("oracle", real_context), request, real_context.scorer)
    assert fits(real_context.memory, choice.plan, request)
    assert choice.evaluations == len(masks)
    assert real_context.scorer.nll(choice.plan) == min(map(real_context.scorer.nll, masks))


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"oracle"}))
@pytest.mark.parametrize("shape", SHAPES)
def test_no_fitting_mask_beats_the_oracle(real_context, name, shape):
    request = Request.at_fraction(real_context.memory, *shape)
    oracle = make_baseline("oracle", real_context).choose(request)
    choice = make_baseline(name, real_context).choose(request)
    nll = real_context.scorer.nll
    assert nll(oracle) <= nll(choice) or not fits(real_context.memory, choice, request)


def test_the_oracle_may_remove_more_than_must_be():
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, -0.2, 0.04, 0.03, 0.2])
    request = Request(1, 1, context.memory.dense_peak_bytes(1, 1) - 900)
    assert OracleBaseline(context).choose(request) == Plan.removing(2, 4)


def test_requests_of_the_oracle_share_their_scores():
    context = SyntheticContext([0.1 + 0.01 * i for i in range(MOST_BLOCKS)], interaction=1.0)
    oracle = OracleBaseline(context)
    for fraction in (0.9, 0.7, 0.5):
        oracle.choose(request_at(context, 8, 250, fraction))
    assert context.scorer.evaluations <= 2**MOST_BLOCKS


def test_the_oracle_rejects_a_larger_model():
    context = SyntheticContext([0.1] * (MOST_BLOCKS + 2))
    with pytest.raises(SearchTooLargeError, match="synthetic has 14 blocks and so 2.14 masks"):
        OracleBaseline(context)


def test_sleb_measures_again_after_each_removal():
    context = SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])
    # Alone layer 2 costs least and layer 3 next, but without layer 2 layer 3 is dear.
    context.scorer.pairs[4, 6] = context.scorer.pairs[6, 4] = 2.0
    sleb = make_baseline("sleb", context)
    assert sleb.choose(needing(context, 100)) == whole_layer(2)
    choice = measure_choice(sleb, needing(context, 4005), context.scorer)
    assert choice.plan == whole_layer(1).without(*whole_layer(2).removed)
    assert choice.evaluations == 4 + 3
    assert sleb.setup_evaluations == 0

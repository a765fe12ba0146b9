"""Searches that start with greedy removal and look further than it does."""

from __future__ import annotations

import numpy as np
import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits, measure_choice
from agents.baselines.searches import BeamBaseline, GreedyPerByteBaseline, GreedySwapsBaseline
from rap_env.blocks import BlockMask
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at

REQUESTS = [(1, 10, 0.7), (8, 250, 0.8), (16, 1000, 0.6), (1, 250, 0.5)]


def trap():
    """The cheapest block is dear beside any other; greedy takes it first and cannot go back."""
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
def test_gets_out_of_greedys_trap(name):
    context = trap()
    request = needing(context, 1500)  # two attention blocks
    assert 0 in make_baseline("greedy_per_byte", context).choose(request)
    mask = make_baseline(name, context).choose(request)
    assert mask == BlockMask.of("layer01.attn", "layer02.attn")


def test_a_beam_of_one_is_caught_in_it():
    context = trap()
    request = needing(context, 1500)
    assert 0 in BeamBaseline(context, width=1).choose(request)
    assert 0 not in BeamBaseline(context, width=2).choose(request)


def test_beam_counts_every_mask_once():
    context = trap()
    choice = measure_choice(BeamBaseline(context, width=2), needing(context, 1500), context.scorer)
    # The dense model, 8 blocks, then 7 more behind each of two blocks, one pair being the same.
    assert choice.evaluations == 1 + 8 + 7 + 7 - 1 == context.scorer.evaluations
    again = measure_choice(BeamBaseline(context, width=2), needing(context, 1500), context.scorer)
    assert (again.mask, again.evaluations) == (choice.mask, choice.evaluations)
    assert again.decision_s > context.scorer.evaluation_s * again.evaluations


def test_beam_counts_useful_bytes_only():
    # Per byte layer02.ffn is cheapest, but an attention block suffices at less loss.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.3, 0.01, 0.02, 0.03, 0.2])
    assert BeamBaseline(context).choose(needing(context, 900)) == BlockMask.of("layer02.attn")
    assert BeamBaseline(context).choose(needing(context, 3000)) == BlockMask.of("layer02.ffn")


def test_beam_gives_the_best_mask_that_it_met():
    """A removal that lowers the loss is taken though the request fits without it."""
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, 0.01, 0.04, 0.03, 0.2])
    assert "layer01.attn" in BeamBaseline(context).choose(needing(context, 3500))


@pytest.mark.parametrize("shape", REQUESTS)
def test_a_wider_beam_scores_more(large, shape):
    request = request_at(large, *shape)
    narrow, wide = (
        measure_choice(BeamBaseline(large, width=width), request, large.scorer) for width in (1, 4)
    )
    assert fits(large.memory, narrow.mask, request)
    assert fits(large.memory, wide.mask, request)
    assert narrow.evaluations < wide.evaluations <= 4 * narrow.evaluations


@pytest.mark.parametrize("shape", REQUESTS)
def test_swaps_end_where_no_swap_helps(large, shape):
    request = request_at(large, *shape)
    choice = GreedySwapsBaseline(large, extra_evaluations=10**6).choose(request)
    greedy = GreedyPerByteBaseline(large).choose(request)
    assert large.scorer.loss(choice) <= large.scorer.loss(greedy)
    kept = [index for index in range(24) if index not in choice]
    for removed in choice:
        fewer = choice - BlockMask.of(removed)
        for near in (fewer, *(fewer | BlockMask.of(index) for index in kept)):
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
    assert fits(large.memory, choice.mask, request)
    if not extra:
        assert (choice.mask, choice.evaluations) == (greedy.mask, greedy.evaluations)


def test_swaps_count_what_greedy_scored_once(large):
    request = request_at(large, 1, 10, 0.7)
    choice = measure_choice(GreedySwapsBaseline(large), request, large.scorer)
    assert choice.evaluations == large.scorer.evaluations
    assert choice.decision_s < large.scorer.evaluation_s  # all of it was run just now

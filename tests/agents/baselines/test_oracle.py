from __future__ import annotations

import itertools

import pytest

from agents.baselines import BASELINES, make_baseline
from agents.baselines.base import fits, measure_choice
from agents.baselines.searches import MOST_BLOCKS, OracleBaseline
from rap_env.blocks import BlockMask
from rap_env.errors import SearchTooLargeError
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at

SHAPES = [(2, 16, 0.85), (8, 64, 0.8), (8, 64, 0.7)]


def all_masks(blocks):
    for removed in itertools.product([False, True], repeat=blocks):
        yield BlockMask.of(*(index for index, gone in enumerate(removed) if gone))


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_best_of_all_masks_of_a_real_model(real_context, shape):
    request = Request.at_fraction(real_context.memory, *shape)
    masks = [m for m in all_masks(6) if fits(real_context.memory, m, request)]
    choice = measure_choice(make_baseline("oracle", real_context), request, real_context.scorer)
    assert fits(real_context.memory, choice.mask, request)
    assert choice.evaluations == len(masks)
    assert real_context.scorer.nll(choice.mask) == min(map(real_context.scorer.nll, masks))


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"oracle"}))
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_that_fits_beats_it(real_context, name, shape):
    request = Request.at_fraction(real_context.memory, *shape)
    oracle = make_baseline("oracle", real_context).choose(request)
    choice = make_baseline(name, real_context).choose(request)
    nll = real_context.scorer.nll
    assert nll(oracle) <= nll(choice) or not fits(real_context.memory, choice, request)


def test_may_remove_more_than_must_be():
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, -0.2, 0.04, 0.03, 0.2])
    request = Request(1, 1, context.memory.dense_peak_bytes(1, 1) - 900)
    assert OracleBaseline(context).choose(request) == BlockMask.of(2, 4)


def test_requests_share_their_scores():
    context = SyntheticContext([0.1 + 0.01 * i for i in range(MOST_BLOCKS)], interaction=1.0)
    oracle = OracleBaseline(context)
    for fraction in (0.9, 0.7, 0.5):
        oracle.choose(request_at(context, 8, 250, fraction))
    assert context.scorer.evaluations <= 2**MOST_BLOCKS


def test_a_larger_model_is_refused():
    context = SyntheticContext([0.1] * (MOST_BLOCKS + 2))
    with pytest.raises(SearchTooLargeError, match="synthetic has 14 blocks and so 2.14 masks"):
        OracleBaseline(context)

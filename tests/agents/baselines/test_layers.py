from __future__ import annotations

import numpy as np
import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits, measure_choice
from rap_env.blocks import BlockMask
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at

LAYER_BYTES = 4004
"""Weights of an attn and an ffn block, and the cache of one token."""


@pytest.fixture
def context():
    return SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])


def needing(context, bytes_over):
    return Request(1, 1, context.memory.dense_peak_bytes(1, 1) - bytes_over)


def layers(*numbers):
    return BlockMask.of(*(2 * n for n in numbers), *(2 * n + 1 for n in numbers))


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
@pytest.mark.parametrize("fraction", [0.95, 0.8, 0.6])
def test_both_blocks_of_a_layer_go_together(context, name, fraction):
    request = request_at(context, 8, 250, fraction)
    mask = make_baseline(name, context).choose(request)
    assert fits(context.memory, mask, request)
    assert mask
    removed = {index // 2 for index in mask}
    assert mask == layers(*removed)
    fewer = [mask - layers(number) for number in removed]
    assert min(context.memory.peak_bytes(m, request) for m in fewer) > request.budget_bytes


def test_shortgpt_follows_the_influence_of_layers(context):
    context.layer_influence = np.array([0.4, 0.3, 0.1, 0.2])
    shortgpt = make_baseline("shortgpt", context)
    assert shortgpt.choose(needing(context, 100)) == layers(2)
    choice = measure_choice(shortgpt, needing(context, LAYER_BYTES + 1), context.scorer)
    assert choice.mask == layers(2, 3)
    assert (choice.evaluations, shortgpt.setup_evaluations) == (0, 1)


def test_sleb_measures_again_after_each_removal(context):
    # Alone layer 2 costs least and layer 3 next, but without layer 2 layer 3 is dear.
    context.scorer.pairs[4, 6] = context.scorer.pairs[6, 4] = 2.0
    sleb = make_baseline("sleb", context)
    assert sleb.choose(needing(context, 100)) == layers(2)
    choice = measure_choice(sleb, needing(context, LAYER_BYTES + 1), context.scorer)
    assert choice.mask == layers(1, 2)
    assert choice.evaluations == 4 + 3
    assert sleb.setup_evaluations == 0


def test_on_a_real_model_the_influence_is_measured(real_context):
    request = Request.at_fraction(real_context.memory, 2, 16, 0.9)
    mask = make_baseline("shortgpt", real_context).choose(request)
    least = int(np.argmin(real_context.layer_influence))
    assert layers(least) <= mask

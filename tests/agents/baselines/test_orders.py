from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits, measure_choice
from rap_env.plan import Plan
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
    return Plan.removing(*(2 * n for n in numbers), *(2 * n + 1 for n in numbers))


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
@pytest.mark.parametrize("fraction", [0.95, 0.8, 0.6])
def test_both_blocks_of_a_layer_are_removed_together(context, name, fraction):
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
    assert choice.plan == layers(2, 3)
    assert (choice.evaluations, shortgpt.setup_evaluations) == (0, 1)


def test_on_a_real_model_the_influence_is_measured(real_context):
    request = Request.at_fraction(real_context.memory, 2, 16, 0.9)
    mask = make_baseline("shortgpt", real_context).choose(request)
    least = int(np.argmin(real_context.layer_influence))
    assert layers(least) <= mask


def test_where_losses_add_up_and_costs_are_equal_the_frontier_has_the_best_mask(context):
    for shape in [(1, 10, 0.8), (8, 250, 0.7), (16, 1000, 0.6)]:
        request = request_at(context, *shape)
        choice = make_baseline("frontier", context).choose(request)
        best = make_baseline("oracle", context).choose(request)
        assert context.scorer.loss(choice) == pytest.approx(context.scorer.loss(best))


def test_the_frontier_looks_up_and_scores_nothing(context):
    baseline = make_baseline("frontier", context)
    before = context.scorer.passes
    choice = measure_choice(baseline, request_at(context, 8, 250, 0.7), context.scorer)
    assert choice.evaluations == 0
    assert context.scorer.passes == before
    assert baseline.setup_evaluations == context.frontier.evaluations == 25


def test_the_frontier_follows_the_gsi_order_where_no_entry_fits(context):
    context.frontier = SimpleNamespace(best=lambda memory, request: None, evaluations=7)
    request = request_at(context, 8, 250, 0.5)
    gsi = make_baseline("gsi", context).choose(request)
    assert make_baseline("frontier", context).choose(request) == gsi != Plan()


def test_a_real_frontier_is_read(real_context):
    request = Request.at_fraction(real_context.memory, 2, 16, 0.7)
    mask = make_baseline("frontier", real_context).choose(request)
    assert mask == real_context.frontier.best(real_context.memory, request)
    assert fits(real_context.memory, mask, request)

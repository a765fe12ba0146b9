from __future__ import annotations

from types import SimpleNamespace

import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits, measure_choice
from rap_env.blocks import BlockMask
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, request_at


@pytest.fixture
def context():
    return SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])


def test_where_losses_add_up_and_costs_are_equal_the_table_has_the_best_mask(context):
    for shape in [(1, 10, 0.8), (8, 250, 0.7), (16, 1000, 0.6)]:
        request = request_at(context, *shape)
        choice = make_baseline("frontier", context).choose(request)
        best = make_baseline("oracle", context).choose(request)
        assert context.scorer.loss(choice) == pytest.approx(context.scorer.loss(best))


def test_looks_up_and_scores_nothing(context):
    baseline = make_baseline("frontier", context)
    before = context.scorer.passes
    choice = measure_choice(baseline, request_at(context, 8, 250, 0.7), context.scorer)
    assert choice.evaluations == 0
    assert context.scorer.passes == before
    assert baseline.setup_evaluations == context.frontier.evaluations == 25


def test_follows_the_gsi_order_where_no_entry_fits(context):
    context.frontier = SimpleNamespace(best=lambda memory, request: None, evaluations=7)
    request = request_at(context, 8, 250, 0.5)
    gsi = make_baseline("gsi", context).choose(request)
    assert make_baseline("frontier", context).choose(request) == gsi != BlockMask()


def test_a_real_table_is_read(real_context):
    request = Request.at_fraction(real_context.memory, 2, 16, 0.7)
    mask = make_baseline("frontier", real_context).choose(request)
    assert mask == real_context.frontier.best(real_context.memory, request)
    assert fits(real_context.memory, mask, request)

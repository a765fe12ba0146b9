from __future__ import annotations

from types import SimpleNamespace

import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits, measure_choice
from rap_env.blocks import BlockMask
from rap_env.request import Request
from tests.agents.synthetic import SyntheticBench, request_at


@pytest.fixture
def bench():
    return SyntheticBench([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])


def test_where_losses_add_up_and_costs_are_equal_the_table_has_the_best_mask(bench):
    for shape in [(1, 10, 0.8), (8, 250, 0.7), (16, 1000, 0.6)]:
        request = request_at(bench, *shape)
        choice = make_baseline("frontier", bench).choose(request)
        best = make_baseline("oracle", bench).choose(request)
        assert bench.scorer.loss(choice) == pytest.approx(bench.scorer.loss(best))


def test_looks_up_and_scores_nothing(bench):
    baseline = make_baseline("frontier", bench)
    before = bench.scorer.passes
    choice = measure_choice(baseline, request_at(bench, 8, 250, 0.7), bench.scorer)
    assert choice.evaluations == 0
    assert bench.scorer.passes == before
    assert baseline.setup_evaluations == bench.frontier.evaluations == 25


def test_follows_the_gsi_order_where_no_entry_fits(bench):
    bench.frontier = SimpleNamespace(best=lambda memory, request: None, evaluations=7)
    request = request_at(bench, 8, 250, 0.5)
    gsi = make_baseline("gsi", bench).choose(request)
    assert make_baseline("frontier", bench).choose(request) == gsi != BlockMask()


def test_a_real_table_is_read(real_bench):
    request = Request.at_fraction(real_bench.memory, 2, 16, 0.7)
    mask = make_baseline("frontier", real_bench).choose(request)
    assert mask == real_bench.frontier.best(real_bench.memory, request)
    assert fits(real_bench.memory, mask, request)

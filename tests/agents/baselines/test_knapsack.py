from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents.baselines import make_baseline
from agents.baselines.base import fits
from agents.baselines.knapsack import cheapest_cover
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext


def brute_force(costs, freed, needed):
    best = np.inf
    for chosen in itertools.product([0, 1], repeat=len(costs)):
        picked = np.array(chosen)
        if picked @ freed >= needed:
            best = min(best, picked @ costs)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    costs, freed = rng.normal(0.5, 0.5, 10), rng.integers(1, 1000, 10)
    needed = int(rng.integers(1, freed.sum()))
    chosen = cheapest_cover(costs, freed, needed)
    assert freed[chosen].sum() >= needed
    assert costs[chosen].sum() == pytest.approx(brute_force(costs, freed, needed))


def test_removes_all_blocks_of_negative_cost_and_no_more():
    costs, freed = np.array([-0.1, 0.2, -0.3]), np.array([5, 5, 5])
    assert cheapest_cover(costs, freed, 10) == [0, 2]
    assert cheapest_cover(costs, freed, 11) == [0, 1, 2]


def test_returns_unmet_if_no_mask_suffices():
    assert cheapest_cover(np.array([1.0, 1.0]), np.array([2, 3]), 6) is None
    assert cheapest_cover(np.array([1.0, 1.0]), np.array([2, 3]), 5) == [0, 1]


def test_large_models_with_two_sizes_are_quick():
    rng = np.random.default_rng(0)
    costs, freed = rng.random(160), np.tile([1_770_624, 5_309_568], 80)
    chosen = cheapest_cover(costs, freed, int(0.4 * freed.sum()))
    assert freed[chosen].sum() >= 0.4 * freed.sum()


def test_beats_one_shot_where_sizes_matter():
    context = SyntheticContext([0.10, 0.2, 0.11, 0.3, 0.12, 0.4, 0.13, 0.5])
    request = Request(1, 1, context.memory.dense_peak_bytes(1, 1) - 3000)
    mask = make_baseline("knapsack", context).choose(request)
    assert mask == Plan.removing("layer00.ffn")  # 0.2, against 0.33 for three attn blocks
    assert context.scorer.loss(mask) < context.scorer.loss(
        make_baseline("one_shot", context).choose(request)
    )


def test_a_budget_that_only_the_empty_model_fits_is_met():
    context = SyntheticContext([0.1] * 8)
    everything = Plan.removing(*context.memory.facts.blocks)
    probe = Request(1, 100, 10**9)
    request = Request(1, 100, context.memory.peak_bytes(everything, probe))
    mask = make_baseline("knapsack", context).choose(request)
    assert mask == everything
    assert fits(context.memory, mask, request)

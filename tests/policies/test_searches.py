"""Searches: greedy steps, and those that look further than greedy does."""

import pytest

from rap_env.plan import Plan
from rap_env.policies import searches
from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from tests.agents.synthetic import SyntheticContext
from tests.policies.requests import SHAPES as LADDER_SHAPES
from tests.policies.requests import needing
from tests.policies.test_methods import chosen


def test_greedy_prefers_loss_per_byte_and_ends_with_the_least_loss_that_suffices():
    # 0.02 nats for 3,000 bytes are cheaper than 0.01 for 1,004.
    context = SyntheticContext([0.5, 4.0, 0.02, 0.3, 0.01, 0.02, 0.03, 0.2])
    assert chosen("greedy_per_byte", context, needing(context, 3000)) == ("layer02.ffn",)
    assert chosen("one_shot", context, needing(context, 3000))[0] == "layer01.attn"
    assert chosen("greedy_per_byte", context, needing(context, 900)) == ("layer02.attn",)


def test_greedy_measures_again_after_each_removal():
    # Neighbours that are each cheap are dear together: one-shot takes both, greedy does not.
    costs = [1.0, 5.0, 0.10, 3.0, 0.11, 3.0, 0.30, 3.0]
    context = SyntheticContext(costs)
    context.scorer.pairs[2, 4] = context.scorer.pairs[4, 2] = 2.0
    request = needing(context, 1500)
    assert chosen("one_shot", context, request) == ("layer01.attn", "layer02.attn")
    assert chosen("greedy_per_byte", context, request) == ("layer01.attn", "layer03.attn")


def test_over_a_ladder_greedy_takes_the_least_measured_price(
    ladder_context, ladder_bytes, between, monkeypatch
):
    """Against a plain loop over all items."""
    request = between(LADDER_SHAPES[1], 0.7)
    costs, ladder = ladder_bytes.costs(*LADDER_SHAPES[1]), ladder_bytes.ladder
    state, scorer = costs.state(), ladder_context.scorer
    while state.peak_bytes > request.budget_bytes:
        nll, needed = scorer.nll(state.plan), state.peak_bytes - request.budget_bytes
        prices = {}
        for item in filter(state.is_valid, range(len(ladder))):
            freed = sum(map(state.freed_bytes, state.companions(item)))
            rise = scorer.nll(ladder.plan(state.positions_after(item))) - nll
            if freed > 0:
                prices[item] = rise if rise <= 0 else rise / min(freed, needed)
        state.lower(min(prices, key=prices.__getitem__))
    exact, lazy = (make_method("greedy_per_byte", ladder_context, ladder_bytes) for _ in range(2))
    lazy.choose(request)
    monkeypatch.setattr(searches, "_LAZY_BATCH", 10**6)  # all steps of each round are measured
    assert scorer.nll(exact.choose(request)) == pytest.approx(scorer.nll(state.plan))
    assert lazy.evaluations < exact.evaluations


def trap():
    """The cheapest single block is expensive in combination; greedy takes it first and keeps it."""
    context = SyntheticContext([0.10, 9.0, 0.11, 9.0, 0.12, 9.0, 0.90, 9.0])
    for other in (2, 4, 6):
        context.scorer.pairs[0, other] = context.scorer.pairs[other, 0] = 1.0
    return context


def test_evolution_escapes_the_greedy_local_optimum():
    context = trap()
    request = needing(context, 1500)  # two attention blocks
    assert 0 in make_method("greedy_per_byte", context).choose(request).removed
    mask = make_method("evolutionary", context).choose(request)
    assert mask == Plan.removing("layer01.attn", "layer02.attn")


def test_sleb_measures_again_after_each_removal():
    context = SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])
    # Alone layer 2 costs least and layer 3 next, but without layer 2 layer 3 is dear.
    context.scorer.pairs[4, 6] = context.scorer.pairs[6, 4] = 2.0
    sleb = make_method("sleb", context)
    assert sleb.choose(needing(context, 100)) == Plan.removing(4, 5)
    choice = measure_choice(sleb, needing(context, 4005), context.scorer)
    assert choice.plan == Plan.removing(2, 3, 4, 5)
    assert choice.evaluations == 4 + 3
    assert sleb.setup_evaluations == 0

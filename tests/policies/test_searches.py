"""Searches: greedy steps, and those that look further than greedy does."""

import pytest

from rap_env.errors import SearchTooLargeError
from rap_env.plan import Plan, every_mask
from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from rap_env.policies.searches import MOST_BLOCKS
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext
from tests.policies.requests import SHAPES as LADDER_SHAPES
from tests.policies.requests import fits, needing
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


def test_over_a_ladder_greedy_takes_the_least_measured_price(ladder_context, ladder_bytes, between):
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
    exact, lazy = (
        make_method(name, ladder_context, ladder_bytes)
        for name in ("greedy_per_byte-exact", "greedy_per_byte")
    )
    assert scorer.nll(exact.choose(request)) == pytest.approx(scorer.nll(state.plan))
    lazy.choose(request)
    assert lazy.evaluations < exact.evaluations


def trap():
    """The cheapest single block is expensive in combination; greedy takes it first and keeps it."""
    context = SyntheticContext([0.10, 9.0, 0.11, 9.0, 0.12, 9.0, 0.90, 9.0])
    for other in (2, 4, 6):
        context.scorer.pairs[0, other] = context.scorer.pairs[other, 0] = 1.0
    return context


@pytest.mark.parametrize("name", ["beam", "evolutionary"])
def test_beam_search_escapes_the_greedy_local_optimum(name):
    context = trap()
    request = needing(context, 1500)  # two attention blocks
    assert 0 in make_method("greedy_per_byte", context).choose(request).removed
    mask = make_method(name, context).choose(request)
    assert mask == Plan.removing("layer01.attn", "layer02.attn")


def test_beam_returns_the_best_mask_seen():
    """A removal that lowers the loss is taken though the request fits without it."""
    context = SyntheticContext([0.5, 4.0, -0.1, 0.3, 0.01, 0.04, 0.03, 0.2])
    assert (
        "layer01.attn" in make_method("beam", context).choose(needing(context, 3500)).removed_names
    )


SHAPES = [(2, 16, 0.85), (8, 64, 0.8), (8, 64, 0.7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_is_the_best_of_all_masks_of_a_real_model(real_context, shape):
    request = Request.at_fraction(real_context.memory, *shape)
    masks = [m for m in every_mask(6) if fits(real_context, m, request)]
    choice = measure_choice(make_method("oracle", real_context), request, real_context.scorer)
    assert fits(real_context, choice.plan, request)
    assert choice.evaluations == len(masks)
    assert real_context.scorer.nll(choice.plan) == min(map(real_context.scorer.nll, masks))


def test_the_oracle_rejects_a_larger_model():
    context = SyntheticContext([0.1] * (MOST_BLOCKS + 2))
    with pytest.raises(SearchTooLargeError, match="synthetic has 14 blocks and so 2.14 of them"):
        make_method("oracle", context)


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

"""Evolution of plans by level switches at equal bytes."""

import numpy as np
import pytest

from rap_env.policies.loading import make_method
from rap_env.policies.method import measure_choice
from tests.agents.synthetic import SyntheticContext, request_at
from tests.masks import best_mask
from tests.policies.requests import SHAPES, fits

REQUESTS = [(1, 10, 0.7), (8, 250, 0.8), (16, 1000, 0.6)]


def evolution(context, ladder_bytes=None, **settings):
    """The method with other settings than its own."""
    method = make_method("evolutionary", context, ladder_bytes)
    vars(method).update(settings)
    return method


@pytest.fixture
def small():
    """4 layers whose blocks raise each other's cost, so that no simple mask is the best."""
    rng = np.random.default_rng(3)
    return SyntheticContext(rng.lognormal(-2, 1, 8), interaction=3.0)


@pytest.mark.parametrize("shape", REQUESTS)
def test_finds_the_best_mask_of_a_small_model(small, shape):
    request = request_at(small, *shape)
    mask = make_method("evolutionary", small).choose(request)
    assert fits(small, mask, request)
    best = best_mask(small, request)
    assert small.scorer.loss(mask) == pytest.approx(small.scorer.loss(best))


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def test_it_improves_on_its_starts_within_its_evaluations(
    ladder_context, ladder_bytes, between, shape
):
    request = between(shape, 0.4)
    few, many = (evolution(ladder_context, ladder_bytes, max_evaluations=most) for most in (4, 120))
    scorer = ladder_context.scorer
    found = [measure_choice(method, request, scorer) for method in (few, many)]
    losses = [scorer.nll(choice.plan) for choice in found]
    assert losses[1] <= losses[0]
    assert all(choice.evaluations <= most for choice, most in zip(found, (4, 120), strict=True))
    assert measure_choice(many, request, scorer).plan == found[1].plan

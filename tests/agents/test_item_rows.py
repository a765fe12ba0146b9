"""Rows of the items of `RAPLadder-v0`, as item-wise networks observe them."""

from __future__ import annotations

import pytest
import torch

from agents.networks import ItemRows
from rap_env.ladder.item_rows import NEIGHBOURS
from rap_env.ladder.observation import ITEM_FEATURES
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.ladders import LadderContext, builder_of

LOWERED = {"layer00.attn": "removed", "layer01.ffn": "int8", "layer02.cache": "int4",
           "embeddings": "int8"}  # fmt: skip


@pytest.fixture(scope="module")
def context():
    return LadderContext()


@pytest.fixture(scope="module")
def builder(context):
    return builder_of(context)


def observed(builder, levels=None, shape=(8, 2000), fraction=0.5):
    request = Request.at_fraction(builder.item_bytes.memory, *shape, fraction)
    seen = builder.build(request, Plan.of(levels or {}))
    return {k: torch.as_tensor(v[None], dtype=torch.float32) for k, v in seen.items()}


def columns_that_change(rows, one, other):
    return set(torch.nonzero((rows(one) - rows(other)).abs().amax(dim=(0, 1))).ravel().tolist())


def test_rows_are_finite_native_and_at_the_lowest_levels(builder):
    rows = ItemRows(builder.space)
    for levels in ({}, LOWERED, builder.ladder.lowest.levels):
        out = rows(observed(builder, levels))
        assert out.shape == (1, 10, rows.features_dim)
        assert torch.isfinite(out).all()


def test_an_item_observes_the_levels_of_its_neighbours(builder):
    rows, numbers = ItemRows(builder.space), builder.ladder.numbers
    found = rows(observed(builder, LOWERED))[0][:, rows.columns["neighbours"]]
    places = {pair: place for place, pair in enumerate(NEIGHBOURS)}
    middle = found[numbers["layer01.attn"]]
    assert middle[places[-1, "attn"]] == 1  # removed
    assert middle[places[-1, "cache"]] == 1  # gone with it
    assert middle[places[0, "ffn"]] == pytest.approx(1 / 3)
    assert middle[places[1, "cache"]] == pytest.approx(2 / 5)
    assert not found[numbers["embeddings"]].any()
    first = found[numbers["layer00.ffn"]]
    assert not first[[places[-1, kind] for kind in ("attn", "ffn", "cache")]].any()


def test_shared_features_are_mean_levels_and_shares_of_lowest_levels(builder):
    rows = ItemRows(builder.space)
    found = rows(observed(builder, LOWERED))[0]
    mean = found[:, rows.columns["mean_level"]]
    expected = torch.tensor([1 / 3, 1 / 9, (1 + 2 / 5) / 3, 1.0])
    assert torch.allclose(mean, expected.expand(10, -1))
    lowest = found[:, rows.columns["lowest"]]
    assert torch.allclose(lowest, torch.tensor([1 / 3, 0.0]).expand(10, -1))


def test_a_cheaper_step_has_a_lower_price(builder):
    rows = ItemRows(builder.space)
    price = rows.columns["compared"].start + len(ITEM_FEATURES)
    before, after = observed(builder), observed(builder)
    after["ladder"][0, 3, ITEM_FEATURES.index("one_shot_cost")] *= 0.5
    assert rows(after)[0, 3, price] < rows(before)[0, 3, price]


@pytest.mark.parametrize(
    ("without", "features"),
    [("gsi", ["order_place", "order_cost"]), ("one_shot", ["one_shot_cost"])],
)
def test_hidden_importance_does_not_reach_the_rows(builder, without, features):
    one, other = observed(builder, LOWERED), observed(builder, LOWERED)
    for name in features:
        other["ladder"][:, :, ITEM_FEATURES.index(name)] = torch.rand(10)
    assert columns_that_change(ItemRows(builder.space), one, other)
    assert not columns_that_change(ItemRows(builder.space, without=[without]), one, other)


def test_without_request_features_requests_of_a_length_have_equal_observations(builder):
    """Which levels are skipped depends on the length, so that it shows in the next costs."""
    one = observed(builder)
    other = observed(builder, shape=(2, 2000), fraction=0.8)
    assert columns_that_change(ItemRows(builder.space), one, other)
    assert not columns_that_change(ItemRows(builder.space, without=["request"]), one, other)


def test_another_ladder_of_as_many_items_has_its_own_neighbours(builder):
    """Its observation space is the same, so that the network is not made again."""
    spec = {"levels": {"weights": ["removed"]}, "together": []}
    other = builder_of(LadderContext(layers=5), spec)
    assert other.space == builder.space
    rows = ItemRows(builder.space)
    rows(observed(builder))
    found = rows(observed(other, {"layer03.ffn": "removed"}))[0][:, rows.columns["neighbours"]]
    places = {pair: place for place, pair in enumerate(NEIGHBOURS)}
    for step in (-1, 0, 1):
        near = [float(layer + step == 3) for layer in range(5) for _ in ("attn", "ffn")]
        assert found[:, places[step, "ffn"]].tolist() == near


def test_vectors_are_per_item_and_shared_features_weigh_them_by_level(builder):
    torch.manual_seed(0)
    rows = ItemRows(builder.space, block_vectors=3)
    found = rows(observed(builder, {"embeddings": "int8"}))[0]
    assert torch.equal(found[:, rows.columns["vectors"]], rows.vectors)
    mean = found[:, rows.columns["lowered_vectors"]]
    assert torch.allclose(mean, (rows.vectors[9] / 10).expand(10, -1))
    assert not ItemRows(builder.space).state_dict()

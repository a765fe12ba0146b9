"""Rows of blocks and of items, as the network in torch observes them."""

import pytest
import torch

from agents.networks import Rows
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.plan import Plan
from rap_env.policies.network_rows import _NEAR_ITEMS
from rap_env.request import Request
from tests.agents.ladders import LadderContext, encoder_of

LOWERED = {"layer00.attn": "removed", "layer01.ffn": "int8", "layer02.cache": "int4",
           "embeddings": "int8"}  # fmt: skip


@pytest.fixture
def blocks(context):
    return ObservationEncoder(mask_bytes(context.memory), context.features)


@pytest.fixture(scope="module")
def items():
    return encoder_of(LadderContext())


def observed(encoder, levels=None, shape=(8, 2000), fraction=0.5):
    request = Request.at_fraction(encoder.memory, *shape, fraction)
    seen = encoder.build(request, Plan.of(levels or {}))
    return {k: torch.as_tensor(v[None], dtype=torch.float32) for k, v in seen.items()}


def without_blocks(encoder, *removed, **request):
    return observed(encoder, Plan.removing(*removed).levels, **request)


def joined(rows, seen):
    """The rows of an observation, (B, N, W)."""
    own, vectors, shared = rows(seen)
    count = own.shape[1]
    parts = own, vectors.expand(len(own), -1, -1), shared.unsqueeze(1).expand(-1, count, -1)
    return torch.cat(parts, dim=2)


def columns_that_change(rows, one, other):
    return set(
        torch.nonzero((joined(rows, one) - joined(rows, other)).abs().amax(dim=(0, 1)))
        .ravel()
        .tolist()
    )


def test_a_block_observes_which_neighbours_are_kept(blocks):
    rows = Rows(blocks.space)
    near = joined(rows, without_blocks(blocks, 4, 7))[0][:, rows.columns["neighbours"]].tolist()
    assert near[5] == [1, 0, 1, 0]  # offsets -2, -1, +1, +2: blocks 3, 4, 6, 7
    assert near[6] == [0, 1, 0, 1]
    assert near[9] == [0, 1, 1, 1]
    assert near[0] == near[11] == [1, 1, 1, 1]  # beyond the ends all are kept


def test_shared_features_are_mean_levels_and_shares_of_lowest_levels(blocks, items):
    rows = Rows(blocks.space)
    removed = joined(rows, without_blocks(blocks, 0, 2, 3))[0][:, rows.columns["mean_level"]]
    assert torch.allclose(removed, torch.tensor([2 / 6, 1 / 6]).expand(12, -1))
    rows = Rows(items.space)
    seen = joined(rows, observed(items, LOWERED))[0]
    mean = torch.tensor([1 / 3, 1 / 9, (1 + 2 / 5) / 3, 1.0]).expand(10, -1)
    assert torch.allclose(seen[:, rows.columns["mean_level"]], mean)
    lowest = torch.tensor([1 / 3, 0.0]).expand(10, -1)
    assert torch.allclose(seen[:, rows.columns["lowest"]], lowest)


def test_blocks_have_means_over_kept_and_over_removed_ones(blocks):
    rows, seen = Rows(blocks.space), without_blocks(blocks, 2, 9)
    out, kept = joined(rows, seen)[0, 0], [n for n in range(12) if n not in (2, 9)]
    features = seen["blocks"][0]
    assert torch.allclose(out[rows.columns["mean_valid"]], features[kept].mean(dim=0))
    assert torch.allclose(out[rows.columns["mean_lowest"]], features[[2, 9]].mean(dim=0))


@pytest.mark.parametrize(
    ("key", "without", "features"),
    [
        ("blocks", "gsi", ["gsi_rank", "gsi_marginal_loss"]),
        ("blocks", "one_shot", ["one_shot_loss"]),
        ("ladder", "gsi", ["order_place", "order_cost"]),
        ("ladder", "one_shot", ["one_shot_cost"]),
    ],
)
def test_hidden_importance_does_not_reach_the_rows(blocks, items, key, without, features):
    encoder = {"blocks": blocks, "ladder": items}[key]
    one, other = observed(encoder), observed(encoder)
    for name in features:
        other[key][:, :, encoder.features.index(name)] = torch.rand(len(encoder.ladder))
    assert columns_that_change(Rows(encoder.space), one, other)
    assert not columns_that_change(Rows(encoder.space, without=[without]), one, other)


def test_without_request_features_all_requests_have_equal_observations(blocks, items):
    for encoder, shape in ((blocks, (16, 1000)), (items, (2, 2000))):  # which levels are skipped
        one = observed(encoder)  # depends on the length, so that it shows in the next costs
        other = observed(encoder, shape=shape, fraction=0.8)
        assert not columns_that_change(Rows(encoder.space, without=["request"]), one, other)
        assert columns_that_change(Rows(encoder.space), one, other)


def test_another_ladder_of_as_many_items_has_its_own_neighbours(items):
    """Its observation space is the same, so that the network is not made again."""
    spec = {"levels": {"weights": ["removed"]}, "together": []}
    other = encoder_of(LadderContext(layers=5), spec)
    assert other.space == items.space
    rows = Rows(items.space)
    rows(observed(items))
    near = joined(rows, observed(other, {"layer03.ffn": "removed"}))[0][
        :, rows.columns["neighbours"]
    ]
    places = {pair: place for place, pair in enumerate(_NEAR_ITEMS)}
    for step in (-1, 0, 1):
        expected = [float(layer + step == 3) for layer in range(5) for _ in ("attn", "ffn")]
        assert near[:, places[step, "ffn"]].tolist() == expected


def test_vectors_are_per_row_and_shared_features_have_those_of_lowered_ones(blocks, items):
    torch.manual_seed(0)
    for encoder, levels, mean in (
        (blocks, Plan.removing(2, 9).levels, lambda vectors: vectors[[2, 9]].mean(dim=0)),
        (items, {"embeddings": "int8"}, lambda vectors: vectors[9] / 10),
    ):
        rows = Rows(encoder.space, block_vectors=3)
        out = joined(rows, observed(encoder, levels))[0]
        assert torch.equal(out[:, rows.columns["vectors"]], rows.vectors)
        lowered = out[:, rows.columns["lowered_vectors"]]
        assert torch.allclose(lowered, mean(rows.vectors).expand(len(out), -1))
        assert not torch.equal(*rows.vectors[:2])
        assert [name for name, _ in rows.named_parameters()] == ["vectors"]
        assert not Rows(encoder.space).state_dict()

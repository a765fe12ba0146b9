from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.networks import BlockRows
from rap_env.ladder.observation import BLOCK_FEATURES, REQUEST_FEATURES, ObservationBuilder
from rap_env.plan import Plan
from tests.agents.synthetic import SyntheticContext, request_at


@pytest.fixture
def builder(context):
    return ObservationBuilder(context.memory, context.features)


def tensors(observation):
    return {k: torch.as_tensor(v[None], dtype=torch.float32) for k, v in observation.items()}


def observed(context, *removed, shape=(4, 500), fraction=0.6):
    builder = ObservationBuilder(context.memory, context.features)
    return tensors(builder.build(request_at(context, *shape, fraction), Plan.removing(*removed)))


def columns_that_change(rows, one, other):
    return set(torch.nonzero((rows(one) - rows(other)).abs().amax(dim=(0, 1))).ravel().tolist())


def test_rows_are_finite_when_all_blocks_are_removed_or_identical():
    same = SyntheticContext([0.1] * 12)
    builder = ObservationBuilder(same.memory, same.features)
    rows = BlockRows(builder.space)
    for removed in ((), range(12)):
        out = rows(observed(same, *removed))
        assert out.shape == (1, 12, rows.features_dim)
        assert torch.isfinite(out).all()


def test_a_block_observes_which_neighbours_are_removed(context, builder):
    rows = BlockRows(builder.space)
    near = rows(observed(context, 4, 7))[0]
    # The columns after the block's own 2 x 7 features, 2 prices, useful share and kept.
    place = 2 * len(BLOCK_FEATURES) + 2 + 2
    found = near[:, place : place + 4].tolist()
    assert found[5] == [1, 0, 1, 0]  # offsets -2, -1, +1, +2: blocks 3, 4, 6, 7
    assert found[6] == [0, 1, 0, 1]
    assert found[9] == [0, 1, 1, 1]
    assert found[0] == found[11] == [1, 1, 1, 1]  # beyond the ends all are kept


def test_global_features_count_removed_blocks_by_kind(context, builder):
    rows = BlockRows(builder.space)(observed(context, 0, 2, 3))[0]
    assert torch.equal(rows[:, -2:], torch.tensor([2 / 6, 1 / 6]).expand(12, -1))


@pytest.mark.parametrize(
    ("without", "features"),
    [("gsi", ["gsi_rank", "gsi_marginal_loss"]), ("one_shot", ["one_shot_loss"])],
)
def test_hidden_importance_does_not_reach_the_rows(context, builder, without, features):
    one, other = observed(context, 3), observed(context, 3)
    for name in features:
        other["blocks"][:, :, BLOCK_FEATURES.index(name)] = torch.rand(12)
    assert columns_that_change(BlockRows(builder.space), one, other)
    assert not columns_that_change(BlockRows(builder.space, without=[without]), one, other)


def test_without_request_features_all_requests_have_equal_observations(context, builder):
    one, other = observed(context, 3), observed(context, 3, shape=(16, 2000), fraction=0.8)
    assert not torch.equal(one["request"], other["request"])
    blind = BlockRows(builder.space, without=["request"])
    assert not columns_that_change(blind, one, other)
    assert columns_that_change(BlockRows(builder.space), one, other)


def test_every_column_can_be_hidden_or_is_of_no_request(context, builder):
    """Together the ablations leave kind, depth and what was removed, and no column is lost."""
    blind = BlockRows(builder.space, without=["gsi", "one_shot", "request"])
    whole = BlockRows(builder.space)
    assert blind.features_dim == whole.features_dim
    seen = blind(observed(context))[0]
    features = dict(zip(BLOCK_FEATURES, seen.T, strict=False))
    shown = {name for name, column in features.items() if column.any()}
    assert shown == {"kind", "depth", "kept"}
    assert len(REQUEST_FEATURES) + 4 * len(BLOCK_FEATURES) + 10 == whole.features_dim


def test_block_vectors_are_per_block_and_global_features_include_removed_ones(context, builder):
    torch.manual_seed(0)
    rows = BlockRows(builder.space, block_vectors=3)
    found = rows(observed(context, 2, 9))[0]
    place = 2 * len(BLOCK_FEATURES) + 2 + 2 + 4
    assert torch.equal(found[:, place : place + 3], rows.vectors)
    assert torch.allclose(found[0, -3:], rows.vectors[[2, 9]].mean(dim=0))
    assert not np.array_equal(*rows.vectors.detach().numpy()[:2])
    assert [name for name, _ in rows.named_parameters()] == ["vectors"]
    assert not BlockRows(builder.space).state_dict()

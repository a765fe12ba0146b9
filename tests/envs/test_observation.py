import itertools

import numpy as np
import pytest

from rap_env.envs.episode import usable_masks
from rap_env.ladder.features import ImportanceFeatures, squash
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.playing import COUNT, make, play
from tests.envs.tiny_contexts import LAYERS


@pytest.fixture
def builder(context) -> ObservationEncoder:
    features = ImportanceFeatures(
        one_shot=np.array([1.0, 0.0, -2.0, 3.0, 0.5, np.inf]),
        gsi_rank=np.linspace(0, 1, COUNT),
        gsi_marginal_loss=np.full(COUNT, 0.25),
    )
    return ObservationEncoder(mask_bytes(context.memory), features)


@pytest.fixture
def request_(context) -> Request:
    return Request.at_fraction(context.memory, 4, 32, 0.75)


def test_request_features_match_the_documented_table(builder, request_):
    memory, seen = builder.memory, builder.build(request_, Plan())["request"]
    dense = memory.breakdown(Plan(), request_)
    assert seen[0] == pytest.approx(0.75, abs=1e-4)
    assert seen[1] == pytest.approx(2 / 8)
    assert seen[2] == pytest.approx(5 / 6)  # 2^5 tokens of 2^6 positions
    assert seen[3] == pytest.approx((dense.peak - request_.budget_bytes) / dense.peak)
    assert seen[4] == pytest.approx(dense.kv_cache / dense.peak)


def test_block_features_match_the_documented_table(builder, request_):
    blocks = builder.build(request_, Plan.removing(2))["blocks"]
    assert blocks[:, 0].tolist() == [0, 1] * LAYERS
    assert blocks[:, 1].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert blocks[:, 2].tolist() == [1, 1, 0, 1, 1, 1]
    assert blocks[:, 4] == pytest.approx([1 / 2, 0, 0, 3 / 4, 1 / 3, 1])
    assert blocks[:, 5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert blocks[:, 6] == pytest.approx([0.2] * COUNT)


def test_freed_share_equals_the_drop_of_the_peak(builder, request_):
    memory = builder.memory
    blocks = builder.build(request_, Plan.removing(2))["blocks"]
    dense = memory.peak_bytes(Plan(), request_)
    for index in range(COUNT):
        freed = dense - memory.peak_bytes(Plan.removing(index), request_)
        assert blocks[index, 3] == pytest.approx(0 if index == 2 else freed / dense)


def test_mask_and_space_agree(builder, request_):
    seen = builder.build(request_, Plan.removing(0, 5))
    assert seen["action_mask"].tolist() == [0, 1, 1, 1, 1, 0]
    assert seen["action_mask"].dtype == np.int8
    assert builder.space.contains(seen)
    everything = Plan.removing(*range(COUNT))
    assert builder.space.contains(builder.build(request_, everything))


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (4096, 64)])
@pytest.mark.parametrize("budget", [1, 2**60])
def test_extreme_requests_stay_in_the_space(builder, shape, budget):
    assert builder.space.contains(builder.build(Request(*shape, budget), Plan()))


@pytest.mark.parametrize("masked", [False, True])
def test_episode_observations_equal_those_built_for_its_masks(context, masked):
    builder = ObservationEncoder(mask_bytes(context.memory), context.features)
    for seed, workload in itertools.product(range(10), ("grid", "azure-conv")):
        env = make(context, workload=workload)
        for step, (seen, *_, info) in enumerate(play(env, seed, masked)):
            built = builder.build(Request(**info["request"]), Plan.removing(*info["removed"]))
            usable_masks(built["action_mask"])
            for key, array in built.items():
                assert np.array_equal(seen[key], array), (seed, step, key)
                assert seen[key].dtype == array.dtype


def test_modifying_observations_does_not_affect_the_episode(context):
    env = make(context)
    plain = play(env, 0, masked=True)
    env.action_space.seed(0)
    seen, _ = env.reset(seed=0)
    for expected, *_ in plain[1:]:
        seen["action_mask"][:] = seen["blocks"][:] = seen["request"][:] = 7
        action = env.action_space.sample(env.action_masks().astype(np.int8))
        seen, *_ = env.step(action)
        assert all(np.array_equal(seen[key], expected[key]) for key in expected)


def test_squash_keeps_the_order_and_ignores_gains():
    losses = np.array([-5, 0, 1e-3, 0.1, 1, 10, 1e9])
    seen = squash(losses)
    assert seen[0] == seen[1] == 0
    assert (np.diff(seen[1:]) > 0).all()
    assert seen.max() <= 1

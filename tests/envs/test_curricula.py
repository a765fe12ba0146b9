"""Workloads around other workloads, in environments that are resumed and run side by side."""

import numpy as np
import pytest

from tests.envs.playing import (
    MODES,
    NUM_ENVS,
    assert_same,
    check_resumed,
    make_sync,
    make_vector,
    play_vector,
    prune_task,
)

SHARES = {"name": "grid", "budget_fractions": [0.5, 0.55, 0.6]}
POOL = {"name": "pool", "of": SHARES, "size": 3}
CURRICULUM = {"name": "curriculum", "of": SHARES, "requests": 6, "start_fraction": 0.95}
WORKLOADS = [POOL, CURRICULUM, {**CURRICULUM, "of": POOL}]


def share(vector, index: int) -> float:
    request = vector.requests[index]
    shape = request.batch_size, request.seq_len_tokens
    return request.budget_bytes / vector.memory.dense_peak_bytes(*shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_sub_environments_draw_what_single_environments_draw(context, mode, workload):
    settings = {"workload": workload, "max_invalid_actions": 3}
    vector = make_vector(context, autoreset_mode=mode, **settings)
    assert_same(play_vector(vector, 1), play_vector(make_sync(context, mode, **settings), 1))


def test_each_sub_environment_has_its_own_curriculum_and_a_seed_restarts_it(context):
    vector = make_vector(context, workload=CURRICULUM)
    vector.reset(seed=0)
    assert [share(vector, index) for index in range(NUM_ENVS)] == pytest.approx(
        [0.95] * NUM_ENVS, abs=0.01
    )
    only_first = np.arange(NUM_ENVS) == 0
    eased = []
    for _ in range(5):
        vector.reset(options={"reset_mask": only_first})
        eased.append(share(vector, 0))
    bounds = [0.95 * (1 - draw / 6) for draw in range(1, 6)]
    assert all(found > bound - 0.01 for found, bound in zip(eased, bounds, strict=True))
    assert max(eased[2:]) < 0.65
    assert share(vector, 1) == pytest.approx(0.95, abs=0.01)
    vector.reset(seed=0)
    assert share(vector, 0) == pytest.approx(0.95, abs=0.01)


def test_a_pool_repeats_its_requests_in_all_sub_environments(context):
    vector = make_vector(context, workload=POOL)
    seen = {request for seed in range(10) for request in _requests(vector, seed)}
    assert len(seen) <= POOL["size"]
    assert len(seen) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_restored_state_continues_identically(context, mode, workload):
    settings = {"autoreset_mode": mode, "workload": workload, "max_episode_steps": 4}
    check_resumed(prune_task(context), 24, **settings)


def _requests(vector, seed: int):
    vector.reset(seed=seed)
    return vector.requests

"""The last observation of an episode: agents choose an action there before an autoreset."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.envs.playing import LONG, make
from tests.envs.playing_v1 import make_ladder_context, make_v1, make_vector_v1
from tests.envs.playing_vectors import MODES, NUM_ENVS, make_vector

OPTIONS = {"request": {**LONG, "budget_bytes": 10}}  # clipped: everything must be given up


@pytest.fixture(scope="module")
def ladder():
    return make_ladder_context()


def softmax_of_masked_logits(masks) -> np.ndarray:
    logits = np.where(np.asarray(masks) > 0, 0.0, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_the_mask_of_a_finished_episode_is_usable(context, ladder, version):
    env = make(context) if version == "v0" else make_v1(ladder)
    seen, _ = env.reset(seed=0, options=OPTIONS)
    terminated = False
    while not terminated:
        valid = np.flatnonzero(seen["action_mask"])
        assert env.action_masks().tolist() == (seen["action_mask"] > 0).tolist()
        seen, _, terminated, truncated, _ = env.step(valid[0])
        assert not truncated
    assert seen["action_mask"].all()
    assert env.action_masks().all()
    assert env.observation_space.contains(seen)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("mode", MODES)
def test_masks_of_finished_sub_environments_are_usable(context, ladder, version, mode):
    make_one, its_context = (make_vector, context) if version == "v0" else (make_vector_v1, ladder)
    envs = make_one(its_context, autoreset_mode=mode)
    seen, _ = envs.reset(seed=0, options=OPTIONS)
    for _ in range(200):
        assert np.isfinite(softmax_of_masked_logits(seen["action_mask"])).all()
        assert envs.action_masks().tolist() == (seen["action_mask"] > 0).tolist()
        actions = np.argmax(seen["action_mask"], axis=1)
        seen, _, terminated, _, infos = envs.step(actions)
        if terminated.all():
            break
    last = infos["final_obs"] if mode == AutoresetMode.SAME_STEP else [seen] * NUM_ENVS
    assert all(observation["action_mask"].all() for observation in last)

"""The vector environment of v1: the episodes of single environments, stepped as arrays."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import rap_env
from rap_env.envs.ladder import RAPLadderVectorEnv
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.plan import Plan
from tests.envs.playing import DENSE_TIMING, assert_same
from tests.envs.playing_v1 import (
    ITEMS,
    long_request,
    make_ladder_context,
    make_sync_v1,
    make_v1,
    make_vector_v1,
)
from tests.envs.playing_vectors import MODES, NUM_ENVS


@pytest.fixture(scope="module")
def ladder():
    return make_ladder_context()


@pytest.fixture(scope="module")
def unordered():
    """A context without an order of the items, as caches that are lowered together need it."""
    return make_ladder_context(importance="none")


EASY = {"name": "azure-conv", "budget_fraction_range": [0.9, 0.95]}
TOGETHER = ["int8", "int4-window32"]


def play_vector(envs, seed: int, steps: int = 60) -> list[tuple]:
    """Random actions, many of them invalid; a reset follows where autoreset does not."""
    rng = np.random.default_rng(seed)
    happened = [envs.reset(seed=seed)]
    for _ in range(steps):
        happened.append(envs.step(rng.integers(envs.single_action_space.n, size=NUM_ENVS)))
        over = happened[-1][2] | happened[-1][3]
        if envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED and over.any():
            happened.append(envs.reset(options={"reset_mask": over}))
    return happened


@pytest.mark.parametrize(
    ("mode", "reward", "workload", "together"),
    [
        (MODES[0], "perplexity", "grid", []),
        pytest.param(MODES[0], DENSE_TIMING, EASY, TOGETHER, marks=pytest.mark.slow),
        (MODES[1], "perplexity", EASY, []),
        (MODES[1], DENSE_TIMING, "grid", TOGETHER),
        (MODES[2], "perplexity", "grid", TOGETHER),
        pytest.param(MODES[2], DENSE_TIMING, EASY, [], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_equals_single_environments(mode, reward, workload, together, ladder, unordered):
    """With every pair of two settings."""
    context = unordered if together else ladder
    settings = {"reward": reward, "workload": workload, "max_invalid_actions": 4}
    settings["together"] = together
    vector = make_vector_v1(context, autoreset_mode=mode, **settings)
    sync = make_sync_v1(context, mode, **settings)
    happened = play_vector(vector, 0)
    assert_same(happened, play_vector(sync, 0))
    steps = [result for result in happened if len(result) == 5]
    assert any(terminated.any() for _, _, terminated, _, _ in steps)
    assert any(truncated.any() for _, _, _, truncated, _ in steps)


@pytest.mark.parametrize("levels", ["masks", {"caches": ["int4"]}], ids=str)
def test_it_equals_single_environments_with_few_levels(ladder, levels):
    long = {"name": "grid", "batch_sizes": [16], "seq_lens_tokens": [500, 512]}
    settings = {"levels": levels, "workload": long, "autoreset_mode": "SameStep"}
    vector = make_vector_v1(ladder, **settings)
    mode = settings.pop("autoreset_mode")
    happened = play_vector(vector, 1)
    assert_same(happened, play_vector(make_sync_v1(ladder, AutoresetMode(mode), **settings), 1))


def test_a_limit_of_steps_and_relative_rewards_are_those_of_single_environments(ladder):
    relative = {"name": "perplexity", "relative_to": "one_shot", "scale": "log"}
    for mode in MODES:
        vector = make_vector_v1(ladder, autoreset_mode=mode, max_episode_steps=3, reward=relative)
        sync = make_sync_v1(ladder, mode, steps=3, reward=relative)
        assert_same(play_vector(vector, 2), play_vector(sync, 2))


def test_gymnasium_makes_it():
    class Holder:
        """Survives gymnasium's deep copy of a spec."""

        def __init__(self, context):
            self.__dict__ = context.__dict__
            self.level_costs = context.level_costs

        def __deepcopy__(self, memo):
            return self

    context = Holder(make_ladder_context(importance="none"))
    envs = gym.make_vec("RAPLadder-v0", num_envs=3, context=context, levels="masks")
    assert type(envs) is RAPLadderVectorEnv is rap_env.RAPLadderVectorEnv
    seen, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(seen)


def test_attributes_of_sub_environments_can_be_read_by_name(ladder):
    vector = make_vector_v1(ladder, render_mode="ansi")
    vector.reset(seed=0, options={"request": long_request(ladder, 0.3)})
    vector.step(np.arange(NUM_ENVS))
    names = [item.name for item in vector.ladder.items]
    assert vector.get_attr("plan") == tuple(
        Plan.of({names[index]: "int8"}) for index in range(NUM_ENVS)
    )
    assert vector.call("action_masks")[0].shape == (ITEMS,)
    assert vector.call("action_masks")[0].all()
    single = make_v1(ladder, render_mode="ansi")
    single.reset(seed=0, options={"request": long_request(ladder, 0.3)})
    single.step(3)
    assert vector.render()[3] == single.render()


@pytest.mark.parametrize(
    ("mode", "reward"),
    [
        *zip(MODES, ("perplexity", DENSE_TIMING, "perplexity"), strict=True),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in zip(MODES, (DENSE_TIMING, "perplexity", DENSE_TIMING), strict=True)
        ),
    ],
)
def test_a_restored_state_continues_identically(ladder, mode, reward):
    settings = {"autoreset_mode": mode, "reward": reward, "max_episode_steps": 9}
    vector = make_vector_v1(ladder, **settings)
    actions = np.random.default_rng(0).integers(ITEMS, size=(30, NUM_ENVS))
    vector.reset(seed=4)
    resumed = make_vector_v1(ladder, **settings)
    for number, row in enumerate(actions):
        result = vector.step(row)
        if number:
            assert_same(resumed.step(row), result)
        over = result[2] | result[3]
        if mode == AutoresetMode.DISABLED and over.any():
            result = vector.reset(options={"reset_mask": over})
        state = json.loads(json.dumps(vector.get_state()))
        resumed = make_vector_v1(ladder, **settings)
        assert_same(resumed.set_state(state), result[0])


def test_impossible_settings_and_actions_are_rejected(ladder):
    for levels in ("everything", {"caches": ["int3"]}):
        with pytest.raises(UnknownNameError):
            make_vector_v1(ladder, levels=levels)
    vector = make_vector_v1(ladder)
    vector.reset(seed=0)
    with pytest.raises(UnknownNameError, match=r"Unknown action 10; .*9 \(embeddings\)"):
        vector.step(np.full(NUM_ENVS, ITEMS))
    with pytest.raises(InvalidRequestError, match="array of 5 actions"):
        vector.step(np.zeros(2, dtype=int))
    assert vector.plans == (Plan(),) * NUM_ENVS

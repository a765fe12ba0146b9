"""Copies and pickles of environments continue their episodes."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from rap_env.context.table import TableContext
from tests.envs.playing import (
    COUNT,
    DENSE_TIMING,
    MODES,
    NUM_ENVS,
    assert_same,
    make,
    make_ladder,
    reset_finished,
)
from tests.models.states import saved
from tests.scoring.tiny_table import all_masks, table_of


@pytest.fixture(scope="module")
def table(context):
    return TableContext(table_of(context, all_masks(COUNT, 2)), "table", importance="one_shot")


def pickled(env):
    return pickle.loads(pickle.dumps(env))


def continued(env, seed: int = 5, steps: int = 30) -> list:
    """What random actions give from here on; a new episode begins where one ends."""
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        seen.append(env.step(int(rng.integers(env.action_space.n))))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return [*seen, env.action_space.sample()]


@pytest.mark.parametrize("reward", ["perplexity", DENSE_TIMING], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_an_environment_on_a_table_continue_identically(table, copied, reward):
    env = make(table, reward=reward, workload="azure-conv")
    other = copied(env)
    env.reset(seed=3)
    other.reset(seed=3)
    assert_same(other.plan, env.plan)
    assert copied(env).np_random_seed == env.np_random_seed == 3
    for steps in (1, 4, 30):
        continued(env, steps, steps)
        other = copied(env)
        assert other.request == env.request
        assert_same(continued(other), continued(copy.deepcopy(env)))
    assert (other.context is table) is (copied is copy.deepcopy)


def test_copies_of_a_live_environment_share_its_model(context, ladder):
    for env in (make(context, workload="grid"), make_ladder(ladder, workload="grid")):
        env.reset(seed=1)
        continued(env, 0, 11)
        other = copy.deepcopy(env)
        assert other.context is env.context
        assert_same(continued(other), continued(env))
        with pytest.raises(pickle.PicklingError, match="make the environment by the model's name"):
            pickle.dumps(env)


def test_a_generator_that_is_set_by_hand_is_used_from_the_next_reset_on(table):
    env, other = (make(table, workload="azure-conv") for _ in range(2))
    env.reset(seed=3)
    env.reset()  # requests are drawn ahead
    env.np_random = np.random.default_rng(7)
    assert env.np_random_seed == pickled(env).np_random_seed == -1
    assert_same(env.reset(), other.reset(seed=7))
    assert_same(env.reset(), other.reset())


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_vector_environments_continue_identically(table, task, mode):
    """Of a table, which has masks only, pickles continue, too."""
    of_masks = task.actions == COUNT
    envs = task.make_vector(table if of_masks else None, autoreset_mode=mode)
    copies = (copy.deepcopy, pickled) if of_masks else (copy.deepcopy,)

    def go_on(one):
        rng, seen = np.random.default_rng(0), []
        for _ in range(12):
            seen.append(one.step(rng.integers(task.actions, size=NUM_ENVS)))
            reset_finished(one, seen)
        return seen

    copies[0](envs).reset(seed=0)
    envs.reset(seed=2)
    for _ in range(3):
        go_on(envs)
        others = [copied(envs) for copied in copies]
        expected = go_on(envs)
        for other in others:
            assert_same(go_on(other), expected)


@pytest.mark.parametrize("version", ["RAPPrune-v0", "RAPLadder-v0"])
def test_a_live_environment_pickles_as_its_specification(tmp_path, version):
    saved(tmp_path, dtype=torch.float32)
    settings = {"workload": "grid", "infeasible": "clip", "importance": "none"}
    env = gym.make(
        version, model=str(tmp_path), calibration={"windows": 1, "window_tokens": 8}, **settings
    )
    env.reset(seed=0)
    env.step(0)
    written = pickle.dumps(env)
    assert len(written) < 20_000
    other = pickle.loads(written)
    assert other.unwrapped.context is env.unwrapped.context  # one model in a process
    assert other.spec == env.spec
    assert_same(other.step(1), env.step(1))
    assert_same(other.reset(), env.reset())

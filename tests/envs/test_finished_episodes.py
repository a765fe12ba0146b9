"""The last observation of an episode: agents choose an action there before an autoreset."""

import warnings

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit

from rap_env.errors import InvalidRequestError
from rap_env.reward import ceiling_nll, over_budget_nll
from tests.envs.playing import DENSE_TIMING, LONG, MODES, NUM_ENVS, play_first_valid

OPTIONS = {"request": {**LONG, "budget_bytes": 10}}  # clipped: everything must be given up


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_finished_sub_environments_are_usable(task, mode):
    envs = task.make_vector(autoreset_mode=mode)
    seen, _ = envs.reset(seed=0, options=OPTIONS)
    for _ in range(200):
        assert seen["action_mask"].any(axis=1).all()  # a softmax over valid actions is finite
        assert envs.action_masks().tolist() == (seen["action_mask"] > 0).tolist()
        actions = np.argmax(seen["action_mask"], axis=1)
        seen, _, terminated, _, infos = envs.step(actions)
        if terminated.all():
            break
    last = infos["final_obs"] if mode == AutoresetMode.SAME_STEP else [seen] * NUM_ENVS
    assert all(observation["action_mask"].all() for observation in last)


def outcome(env) -> tuple[float, bool, dict]:
    """The return of an episode on the request, whether it was truncated, and its last info."""
    steps = play_first_valid(env, {**LONG, "budget_fraction": 0.5})
    *_, truncated, info = steps[-1]
    return sum(reward for _, reward, *_ in steps), truncated, info


@pytest.mark.parametrize(
    "reward", ["perplexity", DENSE_TIMING, {"name": "perplexity", "scale": "log"}]
)
def test_an_episode_out_of_steps_is_not_better_than_a_finished_one(task, reward):
    measured = {"reward": reward, "over_budget": "measured"}
    finished, truncated, _ = outcome(task.make(**measured))
    assert not truncated
    everything = task.make(**measured, infeasible="clip")
    worst = sum(reward for _, reward, *_ in play_first_valid(everything, OPTIONS["request"]))
    cut, truncated, info = outcome(task.make(**measured, max_steps=2))
    assert truncated
    assert cut == pytest.approx(worst)
    assert cut <= finished
    assert not {"loss", "delta_nll"} & info.keys()
    env = task.make(reward=reward, over_budget="worst", max_steps=2)
    bound = over_budget_nll(ceiling_nll(env.memory.facts.vocab_size))
    cut, truncated, _ = outcome(env)
    assert truncated
    log = isinstance(reward, dict) and reward.get("scale") == "log"
    assert cut == pytest.approx(-np.log1p(bound / 0.05) if log else -bound)
    assert cut < worst


def test_an_episode_that_ends_with_its_last_step_is_finished(task):
    env = task.make()
    outcome(env)
    steps = env.current.steps
    assert outcome(task.make(max_steps=steps)) == outcome(task.make())


def test_make_vec_with_max_episode_steps_pays_too(task):
    options = {"request": {**LONG, "budget_fraction": 0.5}}
    results = []
    for settings in (
        {"max_steps": 2},
        {"max_episode_steps": 2},
        {"max_episode_steps": 2, "max_steps": 9},
    ):
        envs = task.make_vector(**settings)
        envs.reset(seed=0, options=options)
        for action in range(2):
            _, rewards, _, truncated, _ = envs.step(np.full(NUM_ENVS, action))
        assert truncated.all()
        assert (rewards < 0).all()
        results.append(rewards.tolist())
    assert results[0] == results[1] == results[2]
    with pytest.raises(InvalidRequestError, match="max_steps must be"):
        task.make_vector(max_steps=0)


def test_a_time_limit_that_ends_episodes_unpaid_is_noticed(task):
    env = TimeLimit(task.make(), 2)
    assert outcome(env)[0] == 0.0  # the trap: no finished episode returns as much
    outcome(env)
    with pytest.warns(UserWarning, match="reset after 2 steps.*max_steps=2"):
        env.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = task.make()
        for steps in (3, 2, 4, 1, 1):  # reset by hand
            env.reset(seed=0, options=OPTIONS)
            for action in range(steps):
                env.step(action)

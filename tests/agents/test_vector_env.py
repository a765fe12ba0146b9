import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.vector_env import GymVecEnv
from rap_env.errors import InvalidRequestError, UnknownNameError
from tests.agents.synthetic import make_env, make_envs, request_at
from tests.envs.playing import assert_same

NUM_ENVS = 4
DENSE = {"name": "perplexity", "timing": "dense"}


def together(context, **settings) -> GymVecEnv:
    return GymVecEnv(make_envs(context, **settings)(NUM_ENVS))


def one_by_one(context, **settings) -> DummyVecEnv:
    return DummyVecEnv([make_env(context, **settings)] * NUM_ENVS)


@pytest.mark.parametrize("reward", ["perplexity", DENSE])
@pytest.mark.parametrize("workload", ["grid", "azure-conv"])
def test_an_agent_cannot_tell_it_from_single_environments(context, reward, workload):
    settings = {"reward": reward, "workload": workload, "max_invalid_actions": 2}
    pair = together(context, **settings), one_by_one(context, **settings)
    for envs in pair:
        envs.seed(7)
    assert_same(*(dict(envs.reset()) for envs in pair))
    rng, ends = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(80):
        actions = rng.integers(12, size=NUM_ENVS)
        results = [envs.step(actions) for envs in pair]
        (seen, rewards, dones, infos), (others, *expected) = results
        assert_same(dict(seen), dict(others))
        assert_same(rewards, expected[0])
        assert_same(dones, expected[1])
        for index in range(NUM_ENVS):
            running = {"TimeLimit.truncated": False}  # infos of running episodes are not read
            assert_same(infos[index], expected[2][index] if dones[index] else running)
            assert_same(pair[0].reset_infos[index], pair[1].reset_infos[index])
            if dones[index]:
                ends[infos[index]["TimeLimit.truncated"]] += 1
                assert not infos[index]["terminal_observation"]["action_mask"].all()
    assert min(ends.values()) > 3


def test_a_new_episode_takes_the_seeds_and_options_given_before(context):
    envs = together(context)
    request = request_at(context, 2, 300, 0.7)
    envs.set_options({"request": request})
    envs.seed(3)
    first = envs.reset()
    assert envs.get_attr("request") == [request] * NUM_ENVS
    second = envs.reset()  # options are used once
    assert not np.array_equal(first["request"], second["request"])
    third = envs.reset()  # and so are seeds
    assert not np.array_equal(second["request"], third["request"])
    envs.seed(3)
    assert np.array_equal(envs.reset()["request"], second["request"])
    assert [info["reward_terms"] for info in envs.reset_infos] == [{}] * NUM_ENVS


def test_different_options_for_sub_environments_are_rejected(context):
    envs = together(context)
    envs.set_options([{"request": request_at(context, 2, 300, 0.1 * n)} for n in range(5, 9)])
    with pytest.raises(InvalidRequestError, match="take the same options"):
        envs.reset()


def test_sub_environments_are_addressed_by_index(context):
    envs = together(context)
    envs.set_options({"request": request_at(context, 2, 300, 0.6)})  # takes several removals
    envs.reset()
    envs.step(np.arange(NUM_ENVS))
    masks = envs.env_method("action_masks", indices=[2, 0])
    assert [row.tolist().index(False) for row in masks] == [2, 0]
    assert envs.get_attr("context", indices=1) == [context]
    assert envs.has_attr("action_masks")
    assert not envs.has_attr("speed")
    assert envs.env_is_wrapped(gym.Wrapper) == [False] * NUM_ENVS
    envs.set_attr("label", "all")
    assert envs.envs.label == "all"


def test_other_environments_of_gymnasium_can_be_trained_on():
    one_by_one = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    sync = SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    trained = []
    for envs in (GymVecEnv(sync), one_by_one):
        model = PPO("MlpPolicy", envs, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
        model.learn(256)
        trained.append([parameter.detach().numpy() for parameter in model.policy.parameters()])
    assert all(np.array_equal(one, other) for one, other in zip(*trained, strict=True))


def test_another_autoreset_mode_is_rejected():
    envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    with pytest.raises(UnknownNameError, match="'NextStep'; known are 'SameStep'.*must be reset"):
        GymVecEnv(envs)

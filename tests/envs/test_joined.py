"""Several vector environments as one: the same episodes as apart, for trainers too."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecMonitor

from agents.algorithms import AgentConfig
from agents.trained_policy import TrainedPolicy
from agents.training import train
from agents.vector_env import GymVecEnv, split_infos
from rap_env.envs.joined import JoinedVectorEnv, joined_infos
from rap_env.envs.prune_v1 import RAPPruneV1VectorEnv
from rap_env.errors import InvalidRequestError
from tests.agents.ladders import LadderContext
from tests.agents.synthetic import SyntheticContext
from tests.agents.synthetic import make_envs as make_v0
from tests.agents.test_ladder_agents import make_envs, short
from tests.agents.test_training import Interrupt, assert_same, everything_of, stop_at

SIZES = (3, 2)


@pytest.fixture(scope="module")
def contexts():
    return [LadderContext(), LadderContext()]


def parts_of(contexts, **settings):
    return [
        make_envs(context, **settings)(size) for context, size in zip(contexts, SIZES, strict=True)
    ]


def test_the_episodes_are_those_of_the_parts(contexts):
    joined, apart = JoinedVectorEnv(parts_of(contexts)), parts_of(contexts)
    assert joined.num_envs == 5
    assert joined.ladder.spec == apart[0].ladder.spec
    seen, infos = joined.reset(seed=7)
    firsts = [apart[0].reset(seed=[7, 8, 9]), apart[1].reset(seed=[10, 11])]
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(60):
        for key, values in seen.items():
            assert np.array_equal(values, np.concatenate([one[0][key] for one in firsts]))
        each = [
            info
            for one, count in zip(firsts, SIZES, strict=True)
            for info in split_infos(one[-1], count)
        ]
        np.testing.assert_equal(split_infos(infos, 5), each)
        valid = joined.action_masks()
        assert np.array_equal(valid, np.concatenate([part.action_masks() for part in apart]))
        actions = np.where(valid, rng.random(valid.shape), -1).argmax(axis=1)
        seen, rewards, terminated, truncated, infos = joined.step(actions)
        firsts = [
            part.step(own) for part, own in zip(apart, (actions[:3], actions[3:]), strict=True)
        ]
        assert np.array_equal(rewards, np.concatenate([one[1] for one in firsts]))
        assert np.array_equal(terminated, np.concatenate([one[2] for one in firsts]))
        assert np.array_equal(truncated, np.concatenate([one[3] for one in firsts]))
        ended += int(terminated.sum())
    assert ended > 5
    state = joined.get_state()
    again = JoinedVectorEnv(parts_of(contexts))
    restored = again.set_state(state)
    assert all(np.array_equal(restored[key], seen[key]) for key in seen)
    assert again.get_state() == state


def test_an_episode_that_ends_in_one_part_has_its_last_observation(contexts):
    venv = VecMonitor(GymVecEnv(JoinedVectorEnv(parts_of(contexts))))
    venv.seed(0)
    venv.reset()
    ended = set()
    for _ in range(60):
        valid = np.stack(venv.env_method("action_masks"))
        *_, dones, infos = venv.step(valid.argmax(axis=1))
        for index in np.flatnonzero(dones).tolist():
            assert infos[index]["terminal_observation"].keys() == {
                "request", "ladder", "action_mask"
            }  # fmt: skip
            assert "loss" in infos[index]
            ended.add(index)
    assert ended == set(range(5))
    assert {id(one) for one in venv.get_attr("context")} == set(map(id, contexts))


def test_a_training_on_several_contexts_counts_all_scores_and_resumes(tmp_path, contexts):
    def envs(num_envs):
        return JoinedVectorEnv([make_envs(context)(num_envs // 2) for context in contexts])

    config = short(n_envs=4)
    before = [context.scorer.known for context in contexts]
    result = train(config, envs, tmp_path / "whole", progress=False)
    asked = [context.scorer.known - known for context, known in zip(contexts, before, strict=True)]
    assert all(asked)
    assert result.evaluations == sum(asked)
    with pytest.raises(Interrupt):
        train(config, envs, tmp_path / "cut", log_fns=[stop_at(150)], progress=False)
    train(config, envs, tmp_path / "cut", progress=False)
    assert_same(everything_of(tmp_path / "whole"), everything_of(tmp_path / "cut"))
    assert isinstance(config, AgentConfig)
    assert TrainedPolicy.load(tmp_path / "whole", contexts[1]).lowers


def test_missing_infos_are_zero_or_none():
    one = {"x": np.array([1.0, 2.0]), "_x": np.array([True, True]),
           "in": {"y": np.array([3]), "_y": np.array([True])}}  # fmt: skip
    other = {"names": np.array(["a"], dtype=object), "_names": np.array([True])}
    found = joined_infos([one, other], [2, 1])
    assert found["x"].tolist() == [1.0, 2.0, 0.0]
    assert found["_x"].tolist() == [True, True, False]
    assert found["names"].tolist() == [None, None, "a"]
    assert found["in"]["_y"].tolist() == [True, False]


def test_environments_that_differ_are_not_joined(contexts):
    ladder = make_envs(contexts[0])(1)
    for others in ([], [ladder, make_v0(SyntheticContext([1.0, 2.0]))(1)]):
        with pytest.raises(InvalidRequestError, match="one observation space"):
            JoinedVectorEnv(others)
    later = RAPPruneV1VectorEnv(context=contexts[0], num_envs=1, **ladder.ladder.spec)
    with pytest.raises(InvalidRequestError, match="2 different ones"):
        JoinedVectorEnv([ladder, later])
    joined = JoinedVectorEnv([ladder])
    with pytest.raises(InvalidRequestError, match="one for each of 1 sub-environments, not 2"):
        joined.reset(seed=[1, 2])
    with pytest.raises(InvalidRequestError, match="reset together"):
        joined.reset(options={"reset_mask": np.array([True])})


def test_it_renders_every_sub_environment(contexts):
    joined = JoinedVectorEnv(parts_of(contexts, render_mode="ansi"))
    joined.reset(seed=0)
    frames = joined.render()
    assert len(frames) == 5
    assert all("layer" in frame or "attn" in frame for frame in frames)
    silent = JoinedVectorEnv(parts_of(contexts))
    silent.reset(seed=0)
    with pytest.warns(UserWarning, match="does nothing without a render_mode"):
        assert silent.render() is None

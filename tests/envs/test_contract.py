"""What gymnasium, its wrappers and agents ask of an environment, for both tasks."""

import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rap_env
from rap_env.errors import UnknownNameError
from rap_env.plan import Plan
from tests.envs.playing import DENSE_TIMING, assert_same, play
from tests.models.states import saved


@pytest.mark.parametrize("workload", ["fixed", "grid", "azure-conv"])
def test_gymnasium_accepts_it(task, workload):
    env = task.make(workload=workload, reward=DENSE_TIMING)
    check_env(env, skip_render_check=True, skip_close_check=True)


@pytest.mark.filterwarnings("error", "ignore:.*unconventional shape:UserWarning")
def test_stable_baselines_accepts_it(task):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(task.make())


def test_maskable_ppo_finds_the_masks(task):
    contrib = pytest.importorskip("sb3_contrib")
    env = task.make(invalid_action_penalty=1e6)
    agent = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=16, seed=0)
    agent.learn(32)
    assert agent.rollout_buffer.rewards.min() > -1e5  # no invalid action was taken


def test_random_play_leaves_the_weights_as_they_were(task):
    llm = task.context.llm
    weights = llm.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    play(task.make(reward=DENSE_TIMING), 99)
    assert llm.plan == Plan()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


SETTINGS = {
    "workload": "grid", "infeasible": "clip", "importance": "none", "store": None,
    "calibration": {"windows": 1, "window_tokens": 8},
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """Arguments of an environment on a tiny model in a folder."""
    return {**SETTINGS, "model": str(saved(tmp_path / "model", dtype=torch.float32))}


def six_steps(envs) -> list:
    seen = [envs.reset(seed=0)]
    for action in range(6):
        seen.append(envs.step(np.full(2, action % 4)))
    return seen


@pytest.mark.parametrize("version", ["RAPPrune-v0", "RAPLadder-v0"])
def test_vector_kwargs_work_in_every_mode(settings, version):
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    own = rap_env.make_vec(version, 2, vector_kwargs=mode, **settings)
    plain = gym.make_vec(version, 2, **mode, **settings)
    sync = [
        make(version, 2, vectorization_mode="sync", vector_kwargs=mode, **settings)
        for make in (rap_env.make_vec, gym.make_vec)
    ]
    assert isinstance(own, rap_env.RAPPruneVectorEnv | rap_env.RAPLadderVectorEnv)
    for envs in (own, plain, *sync):
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert_same(six_steps(envs), six_steps(own))
    assert isinstance(sync[0], SyncVectorEnv)
    with pytest.raises(UnknownNameError, match="'autoreset'.*Did you mean"):
        rap_env.make_vec(version, 2, vector_kwargs={"autoreset": "SameStep"}, **settings)


def test_a_worker_says_that_its_model_is_a_copy(settings, monkeypatch, caplog):
    monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    gym.make("RAPLadder-v0", **settings)
    [message] = [message for message in caplog.messages if "own copy of model" in message]
    assert "leave out vectorization_mode" in message

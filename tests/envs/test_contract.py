"""What gymnasium, its wrappers and agents ask of an environment, for both tasks."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import FlattenObservation

import rap_env
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.envs.prune import RAPPruneEnv
from rap_env.plan import Plan
from tests.envs.playing import DENSE_TIMING, play


@pytest.mark.parametrize("workload", ["fixed", "grid", "azure-conv"])
def test_gymnasium_accepts_it(task, workload):
    env = task.make(workload=workload, reward=DENSE_TIMING)
    check_env(env, skip_render_check=True, skip_close_check=True)


@pytest.mark.filterwarnings("error", "ignore:.*unconventional shape:UserWarning")
def test_stable_baselines_accepts_it(task):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(task.make())


@pytest.mark.parametrize("name", ["PPO", "DQN"])
def test_agents_of_stable_baselines_learn_on_it(task, name):
    sb3 = pytest.importorskip("stable_baselines3")
    short = {"n_steps": 16, "batch_size": 16} if name == "PPO" else {"learning_starts": 8}
    env = task.make()
    agent = getattr(sb3, name)("MultiInputPolicy", env, seed=0, device="cpu", **short)
    agent.learn(32)
    action, _ = agent.predict(env.reset(seed=1)[0], deterministic=True)
    assert env.action_space.contains(action.item())


def test_maskable_ppo_finds_the_masks(task):
    contrib = pytest.importorskip("sb3_contrib")
    env = task.make(invalid_action_penalty=1e6)
    agent = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=16, seed=0)
    agent.learn(32)
    assert agent.rollout_buffer.rewards.min() > -1e5  # no invalid action was taken


def test_it_flattens(task):
    assert task.make().action_space.n == task.actions
    env = FlattenObservation(task.make())
    seen, _ = env.reset(seed=0)
    assert seen.shape == (5 + task.columns * task.actions + task.actions,)
    assert env.observation_space.contains(seen)


@pytest.mark.parametrize("reward", ["perplexity", DENSE_TIMING])
def test_random_play_is_the_same_for_the_same_seed(task, reward):
    one, other = (task.make(reward=reward, workload="azure-conv") for _ in range(2))
    for seed in range(5):
        first, second = play(one, seed), play(other, seed)
        assert data_equivalence(first, second)
        assert not data_equivalence(first[0], play(one, seed + 100)[0])


def test_random_play_leaves_the_weights_as_they_were(task):
    llm = task.context.llm
    weights = llm.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    play(task.make(reward=DENSE_TIMING), 99)
    assert llm.plan == Plan()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


def test_the_package_exports_and_registers_them():
    assert rap_env.RAPPruneEnv is RAPPruneEnv
    assert rap_env.RAPLadderEnv is RAPLadderEnv
    spec = gym.spec("RAPLadder-v0")
    assert spec.entry_point == "rap_env.envs.ladder:RAPLadderEnv"
    assert spec.vector_entry_point == "rap_env.envs.ladder:RAPLadderVectorEnv"

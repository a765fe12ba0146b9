from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer

from agents.algorithms import AgentConfig, make_model
from agents.baselines import make_baseline
from agents.group_ppo import Episode, GroupBuffer, group_advantages, whole_episodes
from agents.policy import TrainedPolicy
from agents.training import make_vector_env, train
from tests.agents.synthetic import make_envs, request_at

SPACE = spaces.Dict({"request": spaces.Box(0, 1, (5,), np.float32)})
EASY, HARD, ONCE = (0.2, 0.1, 0.5, 0.0, 0.3), (0.2, 0.1, 0.5, 0.0, 0.9), (0.9, 0.1, 0.5, 0.0, 0.3)
POOL = {"name": "grid", "batch_sizes": [1, 8], "seq_lens_tokens": [500]}

# Three lanes of six steps; a letter is the request, a capital one begins an episode.
LANES = ["EeeHhh", "eHhhEe", "OooEee"]
LAST_DONES = np.array([True, False, True])
REWARDS = np.array([[0, 0, -1, 0, 0, -9], [-5, 0, 0, -7, 0, 0], [0, 0, -4, 0, 0, -3]]).T


def filled(kind, gamma=1.0):
    """A rollout buffer with those episodes, whose values are zero."""
    buffer = kind(6, SPACE, spaces.Discrete(3), gamma=gamma, gae_lambda=0.9, n_envs=3)
    requests = {"e": EASY, "h": HARD, "o": ONCE}
    zeros = torch.zeros(3)
    for step in range(6):
        letters = [lane[step] for lane in LANES]
        seen = np.array([requests[letter.lower()] for letter in letters], dtype=np.float32)
        seen[:, 3] = 0.1 * step  # bytes over change from step to step
        starts = np.array([letter.isupper() for letter in letters])
        buffer.add({"request": seen}, zeros.numpy(), REWARDS[step], starts, zeros, zeros)
    buffer.compute_returns_and_advantage(zeros, LAST_DONES)
    return buffer


def test_whole_episodes_begin_and_end_in_the_rollout():
    starts = filled(GroupBuffer).episode_starts
    found = list(whole_episodes(starts, LAST_DONES))
    assert found == [(0, 0, 3), (0, 3, 6), (1, 1, 4), (2, 0, 3), (2, 3, 6)]


def test_advantages_are_relative_to_the_other_episodes_of_the_request():
    advantages = filled(GroupBuffer).advantages
    gae = filled(DictRolloutBuffer).advantages
    assert advantages[:, 0].tolist() == [2, 2, 2, -2, -2, -2]  # -1 against -3, -9 against -7
    assert advantages[1:4, 1].tolist() == [2, 2, 2]
    assert advantages[3:, 2].tolist() == [-2, -2, -2]
    for steps, lane in ((slice(0, 1), 1), (slice(4, 6), 1), (slice(0, 3), 2)):
        assert np.array_equal(advantages[steps, lane], gae[steps, lane])  # cut, or the only one


def test_what_values_learn_is_unchanged():
    assert np.array_equal(filled(GroupBuffer).returns, filled(DictRolloutBuffer).returns)


def test_the_mean_leaves_the_episode_itself_out():
    rewards = np.array([[-1.0, -2.0, -6.0]], dtype=np.float32)
    requests = np.broadcast_to(np.array(EASY, dtype=np.float32), (1, 3, 5))
    episodes = [Episode(lane, 0, 1) for lane in range(3)]
    found = group_advantages(rewards, requests, iter(episodes), gamma=1.0)
    assert list(found.values()) == [3.0, 1.5, -4.5]


def test_returns_are_discounted_as_the_agent_is():
    advantages = filled(GroupBuffer, gamma=0.5).advantages
    assert advantages[0, 0] == pytest.approx(0.25 * (-1 + 3))


@pytest.mark.parametrize("name", ["group_ppo", "group_maskable_ppo"])
def test_its_rollouts_have_group_advantages(bench, name):
    config = AgentConfig(name, n_envs=4, hyperparameters={"n_steps": 64, "n_epochs": 1})
    model = make_model(config, make_vector_env(config, make_envs(bench, workload=POOL)))
    seen = []
    add = model.rollout_buffer.compute_returns_and_advantage

    def remember(last_values, dones):
        add(last_values, dones)
        buffer = model.rollout_buffer
        whole = whole_episodes(buffer.episode_starts, dones)
        found = group_advantages(buffer.rewards, buffer.observations["request"], whole, 1.0)
        seen.extend((buffer.advantages[e.first, e.lane], value) for e, value in found.items())

    model.rollout_buffer.compute_returns_and_advantage = remember
    model.learn(256)
    assert len(seen) > 10
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in seen)
    assert np.mean([value for _, value in seen]) == pytest.approx(0, abs=1e-5)


def test_it_learns_where_requests_repeat(tmp_path, bench):
    config = AgentConfig("group_maskable_ppo", total_timesteps=3000)
    train(config, make_envs(bench, workload=POOL), tmp_path, progress=False)
    policy = TrainedPolicy.load(tmp_path, bench)
    one_shot = make_baseline("one_shot", bench)
    requests = [request_at(bench, size, 500, f) for size in (1, 8) for f in (0.6, 0.7, 0.8, 0.9)]

    def loss(method):
        return np.mean([bench.scorer.loss(method.select(r).mask) for r in requests])

    assert loss(policy) < loss(one_shot)

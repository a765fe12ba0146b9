from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.policies import Q_INVALID, BlockRows
from rap_env.blocks import BlockMask
from tests.agents.synthetic import SyntheticBench, make_env, request_at

KINDS = [(name, policy) for name in ALGORITHMS for policy in ("blockwise", "mlp")]


def model_of(name, policy, bench):
    venv = DummyVecEnv([make_env(bench)])
    return make_model(AgentConfig(name, policy, n_envs=1), venv)


def scores(model, observation):
    """Logits or Q values of one observation, shape (2L,)."""
    policy = model.policy
    tensors, _ = policy.obs_to_tensor(observation)
    with torch.no_grad():
        if "dqn" in type(model).__name__.lower():
            return policy.q_net(tensors)[0].numpy()
        return policy.get_distribution(tensors).distribution.logits[0].numpy()


def observed(bench, *removed, fraction=0.6):
    env = make_env(bench)()
    observation, _ = env.reset(options={"request": request_at(bench, 4, 500, fraction)})
    for index in removed:
        observation, *_ = env.step(index)
    return observation


@pytest.mark.parametrize(("name", "policy"), KINDS)
def test_saved_and_loaded_by_sb3_itself(tmp_path, bench, name, policy):
    model = model_of(name, policy, bench)
    model.save(tmp_path / "model.zip")
    again = type(model).load(tmp_path / "model.zip", device="cpu")
    observation = observed(bench, 3)
    assert np.array_equal(scores(model, observation), scores(again, observation))
    assert type(again.policy) is type(model.policy)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blockwise_network_does_not_grow_with_the_model(name):
    sizes = []
    for layers in (3, 10):
        model = model_of(name, "blockwise", SyntheticBench([0.1] * 2 * layers))
        assert len(scores(model, observed(SyntheticBench([0.1] * 2 * layers)))) == 2 * layers
        sizes.append(sum(p.numel() for p in model.policy.parameters()))
    assert sizes[0] == sizes[1] < 20_000


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blockwise_scores_follow_the_blocks(name, bench):
    """Two blocks that swap their features swap their scores."""
    model = model_of(name, "blockwise", bench)
    torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in model.policy.parameters())) * 0.3,
        model.policy.parameters(),
    )
    observation = observed(bench, 5)
    swapped = {key: value.copy() for key, value in observation.items()}
    swapped["blocks"][[4, 9]] = swapped["blocks"][[9, 4]]
    before, after = scores(model, observation), scores(model, swapped)
    assert abs(before[4] - before[9]) > 1e-3
    assert after[4] == pytest.approx(before[9], abs=1e-5)
    assert after[9] == pytest.approx(before[4], abs=1e-5)
    assert after[0] == pytest.approx(before[0], abs=1e-5)


@pytest.mark.parametrize("name", ["ppo", "maskable_ppo"])
def test_first_choices_are_near_uniform(name, bench):
    probabilities = np.exp(scores(model_of(name, "blockwise", bench), observed(bench)))
    assert probabilities.max() < 1.2 / 12
    assert probabilities.min() > 0.8 / 12


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
def test_only_masked_dqn_masks_its_q_values(bench, policy):
    observation = observed(bench, 3, 7)
    masked = scores(model_of("masked_dqn", policy, bench), observation)
    assert masked[3] == masked[7] == Q_INVALID
    assert (masked > Q_INVALID).sum() == 10
    assert (scores(model_of("dqn", policy, bench), observation) > Q_INVALID).all()


def test_rows_are_finite_when_all_blocks_are_gone_or_look_alike(bench):
    same = SyntheticBench([0.1] * 12)
    observation = observed(same)
    observation["action_mask"][:] = 0
    rows = BlockRows(make_env(same)().observation_space)
    tensors = {k: torch.as_tensor(v[None], dtype=torch.float32) for k, v in observation.items()}
    out = rows(tensors)
    assert out.shape == (1, 12, rows.features_dim)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_sb3s_predict_gives_valid_actions_where_masks_are_known(name, bench):
    model = model_of(name, "blockwise", bench)
    observation = observed(bench, *range(8), fraction=0.3)
    arguments = {"action_masks": observation["action_mask"]} if name == "maskable_ppo" else {}
    for _ in range(30):
        action, _ = model.predict(observation, deterministic=False, **arguments)
        assert not ALGORITHMS[name].masked or int(action) not in BlockMask.of(*range(8))
        assert np.shape(action) == ()

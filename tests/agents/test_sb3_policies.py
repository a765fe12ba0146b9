import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.networks import Q_INVALID, action_scores
from rap_env.ladder.features import BLOCK_FEATURES
from tests.agents.synthetic import SyntheticContext, make_env, request_at


def model_of(name, context, **settings):
    venv = DummyVecEnv([make_env(context)])
    return make_model(AgentConfig(name, n_envs=1, policy_settings=settings), venv)


def scores(model, observation):
    """Logits or Q values of one observation, shape (2L,)."""
    tensors, _ = model.policy.obs_to_tensor(observation)
    with torch.no_grad():
        return action_scores(model.policy, tensors)[0].numpy()


def observed(context, *removed, fraction=0.6):
    env = make_env(context)()
    observation, _ = env.reset(options={"request": request_at(context, 4, 500, fraction)})
    for index in removed:
        observation, *_ = env.step(index)
    return observation


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blockwise_network_does_not_grow_with_the_model(name):
    sizes = []
    for layers in (3, 10):
        model = model_of(name, SyntheticContext([0.1] * 2 * layers))
        assert len(scores(model, observed(SyntheticContext([0.1] * 2 * layers)))) == 2 * layers
        sizes.append(sum(p.numel() for p in model.policy.parameters()))
    assert sizes[0] == sizes[1] < 20_000


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blockwise_scores_follow_the_blocks(name, context):
    """Two blocks that swap their features swap their scores."""
    model = model_of(name, context)
    torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in model.policy.parameters())) * 0.3,
        model.policy.parameters(),
    )
    observation = observed(context, 0)  # not a neighbour of either
    swapped = {key: value.copy() for key, value in observation.items()}
    swapped["blocks"][[4, 9]] = swapped["blocks"][[9, 4]]
    before, after = scores(model, observation), scores(model, swapped)
    assert abs(before[4] - before[9]) > 1e-3
    assert after[4] == pytest.approx(before[9], abs=1e-5)
    assert after[9] == pytest.approx(before[4], abs=1e-5)
    assert after[6] == pytest.approx(before[6], abs=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_policies_and_their_settings_are_saved_and_loaded_by_sb3(tmp_path, context, name):
    settings = {"hidden": 8, "block_vectors": 3, "without": ["one_shot"]}
    model = model_of(name, context, **settings)
    model.save(tmp_path / "model.zip")
    again = type(model).load(tmp_path / "model.zip", device="cpu")
    observation = observed(context, 3)
    seen = scores(again, observation)
    assert np.array_equal(scores(model, observation), seen)
    assert type(again.policy) is type(model.policy)
    observation["blocks"][:, BLOCK_FEATURES.index("one_shot_loss")] = 0.5
    assert np.array_equal(scores(again, observation), seen)
    assert again.policy.hidden == 8
    grown = model_of(name, context)
    assert sum(p.numel() for p in again.policy.parameters()) < sum(
        p.numel() for p in grown.policy.parameters()
    )


@pytest.mark.parametrize("name", ["ppo", "maskable_ppo"])
def test_an_untrained_policy_is_near_uniform(name, context):
    logits = torch.as_tensor(scores(model_of(name, context), observed(context)))
    probabilities = logits.softmax(dim=0)
    assert probabilities.max() < 1.2 / 12
    assert probabilities.min() > 0.8 / 12


def test_only_masked_dqn_masks_its_q_values(context):
    observation = observed(context, 3, 7)
    masked = scores(model_of("masked_dqn", context), observation)
    assert masked[3] == masked[7] == Q_INVALID
    assert (masked > Q_INVALID).sum() == 10
    assert (scores(model_of("dqn", context), observation) > Q_INVALID).all()

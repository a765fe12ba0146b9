from __future__ import annotations

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.algorithms import ALGORITHMS, AgentConfig, AgentConfigError, make_model
from rap_env.errors import UnknownNameError
from tests.agents.synthetic import make_env


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"name": "pppo"}, UnknownNameError, "Unknown agent 'pppo'.*Did you mean 'ppo'"),
        ({"policy": "cnn"}, UnknownNameError, "Unknown policy 'cnn'.*'blockwise', 'mlp'"),
        ({"total_timesteps": 0}, AgentConfigError, "total_timesteps.*at least 1, not 0"),
        ({"n_envs": 1.5}, AgentConfigError, "n_envs must be a whole number.*not 1.5"),
        ({"seed": -1}, AgentConfigError, "seed.*at least 0, not -1"),
        (
            {"hyperparameters": {"learning_rat": 1e-3}},
            UnknownNameError,
            "of the agent 'maskable_ppo': 'learning_rat'.*Did you mean 'learning_rate'",
        ),
        ({"hyperparameters": {"gamma": 1.5}}, AgentConfigError, "gamma.*0 to 1, not 1.5"),
        ({"hyperparameters": {"learning_rate": -1e-3}}, AgentConfigError, "learning_rate must be"),
        ({"hyperparameters": {"n_steps": "many"}}, AgentConfigError, "n_steps.*not 'many'"),
        (
            {"policy_settings": {"block_vector": 3}},
            UnknownNameError,
            "of the block-wise policy: 'block_vector'.*Did you mean 'block_vectors'",
        ),
        (
            {"policy": "mlp", "policy_settings": {"hidden": 8}},
            AgentConfigError,
            "'mlp' has no policy_settings.*'hidden': 8.*choose policy='blockwise'",
        ),
    ],
)
def test_impossible_settings_are_named(settings, error, text):
    with pytest.raises(error, match=text):
        AgentConfig(**settings)


def test_hyperparameters_are_those_of_the_agent():
    with pytest.raises(UnknownNameError, match="hyperparameters of the agent 'dqn': 'clip_range'"):
        AgentConfig("dqn", hyperparameters={"clip_range": 0.1})
    AgentConfig("ppo", hyperparameters={"clip_range": 0.1, "target_kl": None})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_given_hyperparameters_go_before_the_defaults(name, context):
    config = AgentConfig(name, n_envs=1, hyperparameters={"learning_rate": 0.0123})
    model = make_model(config, DummyVecEnv([make_env(context)]))
    assert model.lr_schedule(1) == pytest.approx(0.0123)
    assert model.lr_schedule(0) == pytest.approx(0.00123)
    assert model.gamma == 1.0
    assert model.batch_size == (32 if "ppo" in name else 64)


def test_policy_settings_reach_the_network(context):
    settings = {"hidden": 7, "block_vectors": 5, "without": ["gsi"]}
    config = AgentConfig("ppo", n_envs=1, policy_settings=settings)
    policy = make_model(config, DummyVecEnv([make_env(context)])).policy
    assert policy.hidden == 7
    assert policy.features_extractor.vectors.shape == (12, 5)


def test_config_as_dict_makes_the_config_again():
    settings = {"without": ["request"]}
    config = AgentConfig("ppo", "blockwise", 500, 2, 7, {"n_steps": 16}, policy_settings=settings)
    assert AgentConfig(**config.as_dict()) == config

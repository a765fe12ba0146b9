from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from agents.hyperparameters import (
    HYPERPARAMETERS,
    AgentConfigError,
    DQNHyperparameters,
    PolicySettings,
    PPOHyperparameters,
    with_defaults,
)
from experiments.launch import CONF_DIR
from rap_env.errors import UnknownNameError

PPO, DQN = (with_defaults(name, "hyperparameters", {}) for name in ("ppo", "dqn"))
POLICY = {"hidden": 32, "block_vectors": 0, "without": []}


def changed(**values):
    return PolicySettings.of({**POLICY, **values}, "the block-wise policy")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"hiden": 3}, UnknownNameError, "policy: 'hiden'.*Did you mean 'hidden'"),
        ({"hidden": 0}, AgentConfigError, "hidden must be a whole number of at least 1, not 0"),
        ({"hidden": True}, AgentConfigError, "hidden.*not True"),
        ({"block_vectors": -1}, AgentConfigError, "block_vectors.*at least 0, not -1"),
        ({"block_vectors": 2.5}, AgentConfigError, "block_vectors.*not 2.5"),
        ({"without": ["gsy"]}, UnknownNameError, "without: 'gsy'.*Did you mean 'gsi'"),
        ({"without": "gsi"}, AgentConfigError, "without must be a list of ablations, not 'gsi'"),
    ],
)
def test_impossible_settings_are_named(given, error, text):
    with pytest.raises(error, match=text):
        changed(**given)


@pytest.mark.parametrize(
    ("kind", "valid", "given", "text"),
    [
        (PPOHyperparameters, PPO, {"n_steps": 1.5}, "n_steps must be a whole number.*not 1.5"),
        (PPOHyperparameters, PPO, {"n_steps": "many"}, "n_steps.*not 'many'"),
        (PPOHyperparameters, PPO, {"learning_rate": -1e-3}, "learning_rate must be.*not -0.001"),
        (PPOHyperparameters, PPO, {"gamma": True}, "gamma must be a number from 0 to 1, not True"),
        (PPOHyperparameters, PPO, {"gamma": None}, "gamma must be.*not None"),
        (PPOHyperparameters, PPO, {"ent_coef": float("nan")}, "ent_coef must be.*not nan"),
        (PPOHyperparameters, PPO, {"target_kl": -1}, "target_kl must be a number.*not -1"),
        (DQNHyperparameters, DQN, {"gradient_steps": -2}, "gradient_steps.*at least -1, not -2"),
    ],
)
def test_impossible_hyperparameters_are_named(kind, valid, given, text):
    kind(**valid)
    with pytest.raises(AgentConfigError, match=f"hyperparameters.{text}"):
        kind(**{**valid, **given})


def test_a_missing_setting_is_named():
    with pytest.raises(AgentConfigError, match="The hyperparameters of dqn lack batch_size"):
        DQNHyperparameters.of({k: v for k, v in DQN.items() if k != "batch_size"}, "dqn")


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_an_agents_file_has_exactly_its_settings(name):
    file = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "agent" / f"{name}.yaml"))
    assert file["name"] == name
    assert list(file["hyperparameters"]) == [entry.name for entry in fields(HYPERPARAMETERS[name])]
    assert list(file["policy_settings"]) == [entry.name for entry in fields(PolicySettings)]

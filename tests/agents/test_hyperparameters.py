from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from agents.algorithms import (
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


@pytest.mark.parametrize(
    ("kind", "given", "error", "text"),
    [
        (PolicySettings, {"hiden": 3}, UnknownNameError, "'hiden'.*Did you mean 'hidden'"),
        (PolicySettings, {"without": ["gsy"]}, UnknownNameError, "without 'gsy'.*mean 'gsi'"),
        (PPOHyperparameters, {"gamma": 1.5}, AgentConfigError, "gamma .* from 0 to 1, not 1.5"),
        (DQNHyperparameters, {"gradient_steps": -2}, AgentConfigError, "least -1, not -2"),
    ],
)
def test_impossible_settings_are_named(kind, given, error, text):
    valid = {PolicySettings: POLICY, PPOHyperparameters: PPO, DQNHyperparameters: DQN}[kind]
    kind.of(valid, "the agent")
    with pytest.raises(error, match=text):
        kind.of({**valid, **given}, "the agent")


def test_a_missing_setting_is_named():
    with pytest.raises(AgentConfigError, match="The hyperparameters of dqn lack batch_size"):
        DQNHyperparameters.of({k: v for k, v in DQN.items() if k != "batch_size"}, "dqn")


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_an_agents_file_has_exactly_its_settings(name):
    file = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "agent" / f"{name}.yaml"))
    assert file["name"] == name
    assert list(file["hyperparameters"]) == [entry.name for entry in fields(HYPERPARAMETERS[name])]
    assert list(file["policy_settings"]) == [entry.name for entry in fields(PolicySettings)]

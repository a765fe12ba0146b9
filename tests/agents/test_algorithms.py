import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.algorithms import ALGORITHMS, AgentConfig, AgentConfigError, make_model
from rap_env.errors import UnknownNameError
from tests.agents.synthetic import make_env


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"name": "pppo"}, UnknownNameError, "Unknown agent 'pppo'.*Did you mean 'ppo'"),
        ({"total_timesteps": 0}, AgentConfigError, "total_timesteps.*at least 1, not 0"),
        ({"seed": -1}, AgentConfigError, "seed"),
    ],
)
def test_impossible_settings_are_named(settings, error, text):
    with pytest.raises(error, match=text):
        AgentConfig(**settings)


def test_hyperparameters_are_those_of_the_agent():
    with pytest.raises(UnknownNameError, match="setting of the agent 'dqn': 'clip_range'"):
        AgentConfig("dqn", hyperparameters={"clip_range": 0.1})
    AgentConfig("ppo", hyperparameters={"clip_range": 0.1, "target_kl": None})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_given_hyperparameters_override_the_defaults(name, context):
    config = AgentConfig(name, n_envs=1, hyperparameters={"learning_rate": 0.0123})
    model = make_model(config, DummyVecEnv([make_env(context)]))
    assert model.lr_schedule(1) == pytest.approx(0.0123)
    assert model.lr_schedule(0) == pytest.approx(0.00123)
    assert model.gamma == 1.0
    assert model.batch_size == (32 if "ppo" in name else 64)


class CountsInvalid(BaseCallback):
    """Counts the actions on blocks that were already removed."""

    invalid = 0

    def _on_step(self):
        self.invalid += sum(i["reward_terms"]["invalid_action"] < 0 for i in self.locals["infos"])
        return True


@pytest.mark.parametrize("exploration", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_masked_dqn_never_acts_on_a_removed_block(context, exploration):
    counts = {}
    for name in ("masked_dqn", "dqn"):
        settings = {
            "learning_starts": 100,
            "gradient_steps": 1,
            "batch_size": 16,
            "exploration_initial_eps": exploration,
            "exploration_final_eps": exploration,
        }
        config = AgentConfig(name, n_envs=4, hyperparameters=settings)
        model = make_model(config, DummyVecEnv([make_env(context)] * 4))
        counter = CountsInvalid()
        model.learn(300, callback=counter)
        counts[name] = counter.invalid
    assert counts["masked_dqn"] == 0
    assert counts["dqn"] > 10


def test_random_actions_of_masked_dqn_reach_every_valid_block(context):
    model = make_model(AgentConfig("masked_dqn", n_envs=1), DummyVecEnv([make_env(context)]))
    model.exploration_rate = 1.0
    observation = model.env.reset()
    observation["action_mask"][:] = 0
    observation["action_mask"][0, [2, 5, 11]] = 1
    seen = {int(model.predict(observation)[0][0]) for _ in range(100)}
    assert seen == {2, 5, 11}
    single = {key: value[0] for key, value in observation.items()}
    assert np.shape(model.predict(single)[0]) == ()

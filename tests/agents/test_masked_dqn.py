from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.algorithms import AgentConfig, make_model
from tests.agents.synthetic import make_env


class CountsInvalid(BaseCallback):
    """Counts the actions on blocks that were already gone."""

    invalid = 0

    def _on_step(self):
        self.invalid += sum(i["reward_terms"]["invalid_action"] < 0 for i in self.locals["infos"])
        return True


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
@pytest.mark.parametrize("exploration", [1.0, 0.3])
def test_never_acts_on_a_removed_block(context, policy, exploration):
    counts = {}
    for name in ("masked_dqn", "dqn"):
        settings = {
            "learning_starts": 100,
            "gradient_steps": 1,
            "batch_size": 16,
            "exploration_initial_eps": exploration,
            "exploration_final_eps": exploration,
        }
        config = AgentConfig(name, policy, n_envs=4, hyperparameters=settings)
        model = make_model(config, DummyVecEnv([make_env(context)] * 4))
        counter = CountsInvalid()
        model.learn(300, callback=counter)
        counts[name] = counter.invalid
    assert counts["masked_dqn"] == 0
    assert counts["dqn"] > 10


def test_random_actions_reach_every_valid_block(context):
    model = make_model(AgentConfig("masked_dqn", n_envs=1), DummyVecEnv([make_env(context)]))
    model.exploration_rate = 1.0
    observation = model.env.reset()
    observation["action_mask"][:] = 0
    observation["action_mask"][0, [2, 5, 11]] = 1
    seen = {int(model.predict(observation)[0][0]) for _ in range(100)}
    assert seen == {2, 5, 11}
    single = {key: value[0] for key, value in observation.items()}
    assert np.shape(model.predict(single)[0]) == ()


def test_same_seed_same_training(context):
    weights = []
    for _ in range(2):
        config = AgentConfig(
            "masked_dqn", n_envs=2, hyperparameters={"learning_starts": 40, "batch_size": 8}
        )
        model = make_model(config, DummyVecEnv([make_env(context)] * 2))
        model.learn(120)
        weights.append(np.concatenate([p.detach().ravel() for p in model.policy.parameters()]))
    assert np.array_equal(*weights)

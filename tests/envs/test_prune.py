import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

from rap_env.errors import NonFiniteScoreError
from rap_env.plan import Plan
from tests.envs.playing import DENSE_TIMING, make, play, request_at
from tests.envs.tiny_contexts import make_context


class TestEpisode:
    def test_one_evaluation_per_episode_by_default(self):
        context = make_context()
        env = make(context)
        env.reset(seed=0)
        context.scorer.nll(Plan())
        before = context.scorer.evaluations
        _, *steps = play(env, 3, masked=True)
        assert len(steps) > 1
        assert context.scorer.evaluations - before == 1

    @pytest.mark.parametrize("action", [np.array(2), np.array([2]), [2], np.uint8(2)])
    def test_an_array_of_one_integer_is_an_action(self, context, action):
        env = make(context)
        env.reset(seed=0)
        env.step(action)
        assert env.plan.removed == {2}

    def test_nan_from_the_model_does_not_change_the_episode(self):
        context = make_context()
        env = make(context, reward=DENSE_TIMING)
        start, _ = env.reset(seed=0, options={"request": request_at(context, 0.7)})
        head = context.llm.model.get_output_embeddings().weight
        kept = head.detach().clone()
        with torch.no_grad():
            head.fill_(torch.nan)
        context.scorer.nll(Plan.removing(1))  # measured before the damage, by the one-shot scan
        env.step(1)
        with pytest.raises(NonFiniteScoreError, match="gave a non-finite NLL"):
            env.step(3)
        assert env.plan == Plan.removing(1)
        with torch.no_grad():
            head.copy_(kept)
        assert env.step(3)[-1]["removed"] == ["layer00.ffn", "layer01.ffn"]
        again, _ = env.reset(seed=0, options={"request": request_at(context, 0.7)})
        assert data_equivalence(start, again)

import pytest

from rap_env.envs.config import TASK_DOCUMENTS
from rap_env.envs.task import task_scorer
from rap_env.plan import Plan
from tests.envs.playing import make, play
from tests.envs.tiny_contexts import make_context
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def context():
    pytest.importorskip("lm_eval")
    return make_context(tokenizer=tiny_tokenizer())


class TestAccuracy:
    """With lm-eval's own code on generated tasks."""

    def test_the_return_is_the_drop_in_mean_accuracy(self, context):
        tasks = {"names": ["rap_minimal_pairs", "rap_choice"], "limit": 12}
        env = make(context, reward="accuracy", tasks=tasks)
        _, *steps = play(env, 1, masked=True)
        scorer = task_scorer(context, tasks)
        mask = Plan.removing(*steps[-1][-1]["removed"])
        drop = scorer.mean_accuracy(mask) - scorer.mean_accuracy(Plan())
        assert drop != 0
        assert [reward for _, reward, *_ in steps] == [0.0] * (len(steps) - 1) + [drop]
        assert steps[-1][-1]["reward_terms"] == {"accuracy": drop, "invalid_action": 0.0}
        assert "nll" in steps[-1][-1]

    def test_environments_share_the_tasks_of_a_context(self, context):
        first = task_scorer(context, ["rap_choice"])
        assert task_scorer(context, {"names": ("rap_choice",)}) is first
        assert task_scorer(context, {"names": ("rap_choice",), "limit": 3}) is not first
        assert first.config.limit == TASK_DOCUMENTS

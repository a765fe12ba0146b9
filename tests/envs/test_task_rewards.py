"""Rewards for accuracy and recall, with lm-eval's own code on generated tasks."""

import pytest

pytest.importorskip("lm_eval")

from rap_env.envs.config import TASK_DOCUMENTS
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.envs.task import task_scorer
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.playing import make, play, play_first_valid
from tests.envs.tiny_contexts import live_context, make_context, tiny_tokens
from tests.scoring.test_long_context_tasks import word_llm
from tests.tiny import tiny_tokenizer

CHOICES = {"names": ["rap_minimal_pairs", "rap_choice"], "limit": 12}
RECALL = {"names": ["rap_recall_512"], "limit": 16}


@pytest.fixture(scope="module")
def context():
    return make_context(tokenizer=tiny_tokenizer())


def test_the_return_is_the_drop_in_mean_accuracy(context):
    env = make(context, reward="accuracy", tasks=CHOICES)
    _, *steps = play(env, 1, masked=True)
    scorer = task_scorer(context, CHOICES)
    drop = scorer.mean_accuracy(env.plan) - scorer.mean_accuracy(Plan())
    assert drop != 0
    assert [reward for _, reward, *_ in steps] == [0.0] * (len(steps) - 1) + [drop]
    assert steps[-1][-1]["reward_terms"] == {"accuracy": drop, "invalid_action": 0.0}
    assert "nll" in steps[-1][-1]


def test_environments_share_the_tasks_of_a_context(context):
    first = task_scorer(context, ["rap_choice"])
    assert task_scorer(context, {"names": ("rap_choice",)}) is first
    assert task_scorer(context, {"names": ("rap_choice",), "limit": 3}) is not first
    assert first.config.limit == TASK_DOCUMENTS


def test_the_recall_that_lowered_caches_cost_is_paid():
    context = live_context(word_llm(), tiny_tokens(), importance="one_shot")
    levels = {"levels": {"caches": ["native", "int2"]}, "together": ()}
    reward = {"name": "combined", "weights": {"perplexity": 1.0, "recall": 0.5}}
    env = RAPLadderEnv(context=context, reward=reward, tasks=RECALL, **levels)
    request = Request.at_fraction(context.memory, 256, 512, 0.8)
    _, paid, _, _, info = play_first_valid(env, request)[-1]
    assert "int2" in info["levels"]
    scorer = task_scorer(context, RECALL)
    rise = scorer.mean_choice_nll(env.plan) - scorer.mean_choice_nll(Plan())
    assert rise != 0
    assert info["reward_terms"]["recall"] == pytest.approx(-0.5 * rise)
    assert paid == pytest.approx(sum(info["reward_terms"].values()))

"""The reward for recall in both environments, measured with the caches of plans."""

import pytest

pytest.importorskip("lm_eval")

from rap_env.context.live import LiveContext
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.envs.prune import RAPPruneEnv
from rap_env.envs.task import task_scorer
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.playing import play_first_valid
from tests.envs.tiny_contexts import tiny_tokens
from tests.scoring.test_long_context_tasks import word_llm

TASKS = {"names": ["rap_recall_512"], "limit": 16}
SPEC = {"name": "combined", "weights": {"perplexity": 1.0, "recall": 0.5}}


@pytest.fixture(scope="module")
def context():
    return LiveContext(word_llm(), tiny_tokens(), importance="one_shot", progress=False)


def end_of_episode(env):
    """The last step's reward and info."""
    request = Request.at_fraction(env.context.memory, 256, 512, 0.8)
    _, reward, _, _, info = play_first_valid(env, request)[-1]
    return reward, info


def test_v1_pays_for_the_recall_that_lowered_caches_cost(context):
    levels = {"levels": {"caches": ["native", "int2"]}, "together": ()}
    env = RAPLadderEnv(context=context, reward=SPEC, tasks=TASKS, **levels)
    reward, info = end_of_episode(env)
    assert "int2" in info["levels"]
    scorer = task_scorer(context, TASKS)
    rise = scorer.mean_choice_nll(env.plan) - scorer.mean_choice_nll(Plan())
    assert rise != 0
    assert info["reward_terms"]["recall"] == pytest.approx(-0.5 * rise)
    assert reward == pytest.approx(sum(info["reward_terms"].values()))


def test_v0_pays_for_the_recall_that_removed_blocks_cost(context):
    env = RAPPruneEnv(context=context, reward="recall", tasks=TASKS, infeasible="clip")
    reward, info = end_of_episode(env)
    scorer = task_scorer(context, TASKS)
    mask = Plan.removing(*info["removed"])
    expected = scorer.mean_choice_nll(Plan()) - scorer.mean_choice_nll(mask)
    assert reward == pytest.approx(expected)
    assert set(info["reward_terms"]) == {"recall", "invalid_action"}

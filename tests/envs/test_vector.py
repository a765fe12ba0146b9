"""Vector environments are single environments side by side, stepped as arrays."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.envs.playing import (
    COUNT,
    DENSE_TIMING,
    LEVELS,
    MODES,
    NUM_ENVS,
    assert_same,
    ladder_task,
    make_sync,
    make_vector,
    play_vector,
    request_at,
)
from tests.envs.tiny_contexts import make_context
from tests.tiny import tiny_tokenizer

EASY = {"name": "azure-conv", "budget_fraction_range": [0.9, 0.95]}


def both(task, mode, seed=0, context=None, **settings) -> list[tuple]:
    """What a vector environment returned, which single ones returned, too."""
    vector = task.make_vector(context, autoreset_mode=mode, **settings)
    happened = play_vector(vector, seed)
    steps = settings.pop("max_episode_steps", None)
    sync = task.make_sync(mode, steps, context, **settings)
    assert_same(happened, play_vector(sync, seed))
    return happened


@pytest.mark.parametrize(
    ("mode", "reward", "workload"),
    [
        (MODES[0], "perplexity", "azure-conv"),
        (MODES[0], DENSE_TIMING, "grid"),
        (MODES[1], "perplexity", EASY),
        (MODES[1], DENSE_TIMING, "fixed"),
        (MODES[2], "perplexity", "grid"),
        pytest.param(MODES[2], DENSE_TIMING, EASY, marks=pytest.mark.slow),
    ],
)
def test_it_equals_single_environments(task, mode, reward, workload):
    settings = {"reward": reward, "workload": workload, "max_invalid_actions": 4}
    happened = both(task, mode, **settings) + both(task, mode, 1, **settings)
    steps = [result for result in happened if len(result) == 5]
    assert any(terminated.any() for _, _, terminated, _, _ in steps)
    assert any(truncated.any() for _, _, _, truncated, _ in steps)


@pytest.mark.parametrize("levels", ["masks", {"caches": LEVELS["caches"][1:2]}], ids=str)
def test_few_levels_equal_single_environments(ladder, levels):
    long = {"name": "grid", "batch_sizes": [16], "seq_lens_tokens": [500, 512]}
    both(ladder_task(ladder), AutoresetMode.SAME_STEP, 1, levels=levels, workload=long)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "reward", [DENSE_TIMING, {"name": "perplexity", "relative_to": "one_shot", "scale": "log"}]
)
def test_a_limit_of_steps_truncates_as_in_single_environments(task, mode, reward):
    settings = {"invalid_action_penalty": 0.5, "reward": reward, "max_episode_steps": 3}
    happened = both(task, mode, 2, **settings)
    assert any(result[3].any() for result in happened if len(result) == 5)


def test_rewards_with_accuracy_are_those_of_single_environments():
    pytest.importorskip("lm_eval")
    context = make_context(tokenizer=tiny_tokenizer())
    settings = {
        "reward": {"name": "combined", "timing": "dense"},
        "tasks": {"names": ["rap_choice"], "limit": 4},
    }
    for mode in MODES:
        vector = make_vector(context, autoreset_mode=mode, **settings)
        sync = make_sync(context, mode, **settings)
        assert_same(play_vector(vector, 0, steps=15), play_vector(sync, 0, steps=15))


@pytest.mark.parametrize("mode", MODES)
def test_requests_given_at_the_reset_are_those_of_single_environments(context, mode):
    options = {"request": request_at(context, 0.7)}
    vector = make_vector(context, autoreset_mode=mode)
    sync = make_sync(context, mode)
    seeds = [3, None, 5, 6, 7]
    vector.reset(seed=1)
    sync.reset(seed=1)
    first, other = (envs.reset(seed=seeds, options=dict(options)) for envs in (vector, sync))
    assert_same(first, other)
    assert vector.requests == (options["request"],) * NUM_ENVS


class CountsCalls:
    """A real context that records the number of masks of each call."""

    def __init__(self, context) -> None:
        self.context, self.asked = context, []
        self.memory, self.features, self.scorer = context.memory, context.features, self
        self.importance = context.importance

    def __getattr__(self, name):
        return getattr(self.context.scorer, name)

    def nll_many(self, masks):
        self.asked.append(len(masks))
        return self.context.scorer.nll_many(masks)


def test_the_scores_of_a_step_are_requested_in_one_call(context):
    wrapped = CountsCalls(context)
    vector = make_vector(wrapped, reward=DENSE_TIMING, autoreset_mode="SameStep")
    vector.reset(seed=0)
    for step in range(1, 4):
        vector.step(np.arange(NUM_ENVS))
        assert wrapped.asked == [NUM_ENVS] * step
    wrapped.asked.clear()
    terminal = make_vector(wrapped, autoreset_mode="SameStep")
    terminal.reset(seed=0)
    ended = []
    for step in range(30):
        _, _, terminated, truncated, _ = terminal.step(np.full(NUM_ENVS, step % COUNT))
        ended.append(int((terminated | truncated).sum()))
    assert wrapped.asked == [count for count in ended if count]

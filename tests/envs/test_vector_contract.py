import numpy as np
import pytest
import torch

from rap_env.errors import InvalidRequestError, NonFiniteScoreError, UnknownNameError
from rap_env.plan import Plan
from tests.envs.playing import (
    COUNT,
    DENSE_TIMING,
    ITEMS,
    MODES,
    NUM_ENVS,
    assert_same,
    check_resumed,
    make_vector,
    play_vector,
    request_at,
)
from tests.envs.tiny_contexts import make_context


def test_an_environment_has_one_sub_environment_at_least(context):
    with pytest.raises(InvalidRequestError, match="num_envs must be .* at least 1, not 0"):
        make_vector(context, num_envs=0)


def test_later_steps_do_not_modify_earlier_results(context):
    vector = make_vector(context, autoreset_mode="SameStep")
    happened = play_vector(vector, 0, steps=20)
    kept = play_vector(vector, 0, steps=20)
    play_vector(vector, 5, steps=20)
    assert_same(happened, kept)
    seen, info = vector.reset(seed=0)
    for array in (*seen.values(), info["peak_bytes"], info["request"]["budget_bytes"]):
        array[:] = 1
    info["removed"][0].append("nonsense")
    again, infos = vector.reset(options={"reset_mask": np.arange(NUM_ENVS) == 1})
    assert_same(
        {key: array[0] for key, array in again.items()},
        {k: a[0] for k, a in happened[0][0].items()},
    )
    assert infos["removed"].tolist() == [None, [], None, None, None]


def test_attributes_of_sub_environments_can_be_read_by_name(context):
    vector = make_vector(context)
    vector.reset(seed=0, options={"request": request_at(context, 0.7)})
    vector.step(np.arange(NUM_ENVS))
    assert vector.action_masks().tolist() == (1 - np.eye(COUNT))[:NUM_ENVS].astype(bool).tolist()
    assert [row.tolist().index(False) for row in vector.call("action_masks")] == list(
        range(NUM_ENVS)
    )
    assert vector.get_attr("plan") == tuple(Plan.removing(index) for index in range(NUM_ENVS))
    assert vector.get_attr("request") == (request_at(context, 0.7),) * NUM_ENVS
    assert vector.get_attr("context") == (context,) * NUM_ENVS
    assert vector.get_attr("render_mode") == (None,) * NUM_ENVS
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        vector.get_attr("speed")


def test_it_renders_every_sub_environment(context):
    vector = make_vector(context, render_mode="ansi")
    vector.reset(seed=0, options={"request": request_at(context, 0.7)})
    vector.step(np.array([0, 0, 0, 0, 2]))
    pictures = vector.render()
    assert ["attn     .##" in text for text in pictures] == [True] * 4 + [False]
    assert vector.call("render") == pictures
    images = make_vector(context, render_mode="rgb_array")
    images.reset(seed=0)
    assert [image.dtype for image in images.render()] == [np.uint8] * NUM_ENVS
    silent = make_vector(context)
    silent.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert silent.call("render") == (None,) * NUM_ENVS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", ["perplexity", DENSE_TIMING])
def test_a_restored_state_continues_identically(task, mode, reward):
    check_resumed(task, 30, autoreset_mode=mode, reward=reward, max_episode_steps=9)


def test_a_failing_model_changes_no_sub_environment():
    context = make_context()
    vector = make_vector(context, reward=DENSE_TIMING)
    vector.reset(seed=0, options={"request": request_at(context, 0.7)})
    head = context.llm.model.get_output_embeddings().weight
    kept = head.detach().clone()
    first = np.ones(NUM_ENVS, dtype=int)  # measured before the damage, by the one-shot scan
    vector.step(first)
    with torch.no_grad():
        head.fill_(torch.nan)
    with pytest.raises(NonFiniteScoreError, match="gave a non-finite NLL"):
        vector.step(np.array([1, 1, 1, 1, 3]))
    assert vector.plans == (Plan.removing(1),) * NUM_ENVS
    with torch.no_grad():
        head.copy_(kept)
    _, rewards, *_ = vector.step(np.array([1, 1, 1, 1, 3]))
    assert rewards[:4].tolist() == [-0.1] * 4
    assert vector.plans[4] == Plan.removing(1, 3)


@pytest.mark.parametrize("actions", [[[0] * NUM_ENVS], [0, 0, ITEMS, 0, 0], [0.0] * NUM_ENVS])
def test_impossible_actions_are_rejected_and_change_nothing(task, actions):
    vector = task.make_vector()
    vector.reset(seed=0)
    with pytest.raises((InvalidRequestError, UnknownNameError), match="action"):
        vector.step(np.array(actions))
    assert vector.plans == (Plan(),) * NUM_ENVS

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

import rap_env
from rap_env.envs.prune import RAPPruneVectorEnv
from rap_env.errors import InvalidRequestError, NonFiniteScoreError, UnknownNameError
from rap_env.plan import Plan
from tests.envs.conftest import make_context
from tests.envs.playing import COUNT, DENSE_TIMING, USUAL, assert_same, request_at
from tests.envs.playing_vectors import (
    MODES,
    NUM_ENVS,
    make_vector,
    play_vector,
)


def test_gymnasium_makes_it(context):
    class Holder:
        """Survives the deep copy of a spec."""

        memory, features, scorer = context.memory, context.features, context.scorer

        def __deepcopy__(self, memo):
            return self

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec(
            "RAPPrune-v0", num_envs=3, context=Holder(), max_episode_steps=7, **USUAL
        )
    assert type(envs) is RAPPruneVectorEnv is rap_env.RAPPruneVectorEnv
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert RAPPruneVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    seen, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(seen)
    assert envs.action_space == gym.spaces.MultiDiscrete([COUNT] * 3)
    assert envs.single_action_space == gym.spaces.Discrete(COUNT)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_the_autoreset_mode_is_where_frameworks_look_for_it(context, mode):
    envs = make_vector(context, autoreset_mode=mode)
    assert envs.autoreset_mode == envs.metadata["autoreset_mode"] == mode


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
    assert vector.get_attr("mask") == tuple(Plan.removing(index) for index in range(NUM_ENVS))
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
def test_a_restored_state_continues_identically(context, mode, reward):
    settings = {"autoreset_mode": mode, "reward": reward, "max_episode_steps": 9}
    vector = make_vector(context, **settings)
    rng = np.random.default_rng(0)
    actions = rng.integers(COUNT, size=(40, NUM_ENVS))
    vector.reset(seed=4)
    resumed = make_vector(context, **settings)
    for number, row in enumerate(actions):
        result = vector.step(row)
        if number:
            assert_same(resumed.step(row), result)
        over = result[2] | result[3]
        if mode == AutoresetMode.DISABLED and over.any():
            result = vector.reset(options={"reset_mask": over})
        state = json.loads(json.dumps(vector.get_state()))
        resumed = make_vector(context, **settings)
        assert_same(resumed.set_state(state), result[0])


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
    assert vector.masks == (Plan.removing(1),) * NUM_ENVS
    with torch.no_grad():
        head.copy_(kept)
    _, rewards, *_ = vector.step(np.array([1, 1, 1, 1, 3]))
    assert rewards[:4].tolist() == [-0.1] * 4
    assert vector.masks[4] == Plan.removing(1, 3)


def test_finished_sub_environments_wait_for_their_reset(context):
    vector = make_vector(context, autoreset_mode="Disabled", max_episode_steps=1)
    with pytest.raises(ResetNeeded, match="call reset"):
        vector.step(np.zeros(NUM_ENVS, dtype=int))
    with pytest.raises(ResetNeeded, match="call reset"):
        vector.reset(options={"reset_mask": np.arange(NUM_ENVS) == 0})
    vector.reset(seed=0)
    vector.step(np.zeros(NUM_ENVS, dtype=int))
    message = r"sub-environments \[0, 1, 2, 3, 4\] are over; .*reset_mask"
    with pytest.raises(ResetNeeded, match=message):
        vector.step(np.zeros(NUM_ENVS, dtype=int))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_envs": 0}, InvalidRequestError, "num_envs must be .* at least 1, not 0"),
        ({"max_episode_steps": 1.5}, InvalidRequestError, "max_episode_steps .* not 1.5"),
        ({"autoreset_mode": "same"}, UnknownNameError, "autoreset mode 'same'; .*'SameStep'"),
        ({"render_mode": "human"}, UnknownNameError, "render mode 'human'"),
        ({"infeasible": "ignore"}, UnknownNameError, "'ignore'; known are"),
        ({"budget": 1}, UnknownNameError, "setting of the environment: 'budget'; .*'workload'"),
    ],
)
def test_impossible_settings_are_rejected(context, settings, error, message):
    with pytest.raises(error, match=message):
        RAPPruneVectorEnv(context=context, **{"num_envs": 2, **settings})


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        ([0] * (NUM_ENVS - 1), InvalidRequestError, r"array of 5 actions, .* shape \(4,\)"),
        ([[0] * NUM_ENVS], InvalidRequestError, r"shape \(1, 5\)"),
        ([0, 0, COUNT, 0, 0], UnknownNameError, r"Unknown action 6; .*5 \(layer02\.ffn\)"),
        ([0, -1, 0, 0, 0], UnknownNameError, "Unknown action -1"),
        ([0.0] * NUM_ENVS, UnknownNameError, r"Unknown action 0\.0"),
    ],
)
def test_impossible_actions_are_rejected_and_change_nothing(context, actions, error, message):
    vector = make_vector(context)
    vector.reset(seed=0)
    with pytest.raises(error, match=message):
        vector.step(np.array(actions))
    assert vector.masks == (Plan(),) * NUM_ENVS


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"seed": [1, 2]}, InvalidRequestError, "one for each of 5 sub-environments, not 2"),
        ({"options": {"reset_mask": [0, 1]}}, InvalidRequestError, "must hold 5 booleans"),
        ({"options": {"reset_mask": np.zeros(5, bool)}}, InvalidRequestError, "at least one"),
        ({"options": {"requests": 1}}, UnknownNameError, "setting of reset: 'requests'"),
    ],
)
def test_impossible_resets_are_rejected(context, given, error, message):
    with pytest.raises(error, match=message):
        make_vector(context).reset(**given)


def test_reset_options_that_are_no_dict_are_rejected(context):
    with pytest.raises(InvalidRequestError, match="must be a dict such as .*, or None, not 5"):
        make_vector(context).reset(options=5)

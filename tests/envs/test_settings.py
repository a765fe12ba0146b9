from __future__ import annotations

import gymnasium as gym
import pytest

from rap_env.envs.prune import RAPPruneEnv
from rap_env.errors import InvalidRequestError, UnknownNameError
from tests.envs.playing import DENSE_TIMING, make, play
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"infeasible": "ignore"}, UnknownNameError, "'ignore'; known are 'clip', 'error'"),
        ({"render_mode": "human"}, UnknownNameError, "render mode 'human'; .*'rgb_array'"),
        ({"workload": "azure"}, UnknownNameError, "sampler 'azure'"),
        ({"reward": "speed"}, UnknownNameError, "reward 'speed'"),
        ({"invalid_action_penalty": -1}, InvalidRequestError, "0 or above, not -1"),
        ({"max_invalid_actions": 0}, InvalidRequestError, "at least 1, not 0"),
        ({"max_invalid_actions": 1.5}, InvalidRequestError, r"at least 1, not 1\.5"),
    ],
)
def test_impossible_settings_are_refused_when_made(context, settings, error, message):
    with pytest.raises(error, match=message):
        make(context, **settings)


def test_a_misspelt_calibration_key_is_refused_before_a_model_loads():
    with pytest.raises(UnknownNameError, match=r"setting of the calibration: 'window'"):
        RAPPruneEnv("no-such-model", calibration={"window": 3})


def test_make_takes_plain_values(tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "model": str(tmp_path / "model"),
        "workload": {"name": "fixed", "batch_size": 8, "budget_fraction": 0.9},
        "reward": DENSE_TIMING,
        "calibration": {"windows": 2, "window_tokens": 8},
        "importance": "one_shot",
        "store": str(tmp_path / "scores.sqlite"),
    }
    env, twin = (gym.make("RAPPrune-v0", **settings) for _ in range(2))
    assert env.unwrapped.context is twin.unwrapped.context
    assert env.spec.kwargs == settings
    steps = play(env, 0, masked=True)
    assert steps[-1][2]
    assert (tmp_path / "scores.sqlite").exists()
    assert env.get_wrapper_attr("action_masks")().dtype == bool


def test_the_docstring_is_a_complete_environment_page():
    text = RAPPruneEnv.__doc__
    for section in (
        "Description",
        "Observation Space",
        "Action Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Information",
        "Arguments",
        "Version History",
    ):
        assert f"## {section}\n" in text
    for index in (*range(5), *(f"[:, {n}]" for n in range(7)), "[i]"):
        assert f"| {index} |" in text

"""The environment on a model whose removed blocks leave stubs behind."""

import gymnasium as gym
import pytest

from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from tests.envs.playing import DENSE_TIMING, make, play, request_at
from tests.envs.tiny_contexts import tiny_library
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_dense_model_is_the_same_one(context, repaired):
    (_, plain), (_, stubs) = (
        make(each).reset(seed=0, options={"request": request_at(each, 0.7)})
        for each in (context, repaired)
    )
    assert stubs == plain  # no block is removed, so no stub is active


def test_rewards_are_those_of_the_model_with_stubs(context, repaired):
    options = {"request": request_at(context, 0.8)}
    found = {}
    for each in (context, repaired):
        env = make(each, reward=DENSE_TIMING)
        env.reset(seed=0, options=options)
        *_, info = env.step(1)
        found[each] = info["nll"]
        assert info["nll"] == each.scorer.nll(Plan.removing(1))
    assert found[context] != found[repaired]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Plain values that `make` takes, of a model in a folder."""
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return {
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "workload": {"name": "fixed", "batch_size": 8, "budget_fraction": 0.9},
        "calibration": {"windows": 2, "window_tokens": 8},
        "importance": "one_shot",
        "store": str(tmp_path / "scores.sqlite"),
    }


def test_make_accepts_names_and_a_path(settings, tmp_path):
    plain = gym.make("RAPPrune-v0", **settings)
    assert plain.unwrapped.memory.facts.repair == ""
    fitted = gym.make("RAPPrune-v0", repair="library", **settings)
    again = gym.make_vec("RAPPrune-v0", num_envs=2, repair="library", **settings)
    assert fitted.spec.kwargs["repair"] == "library"
    assert again.context is fitted.unwrapped.context
    mine = tiny_library(shared_llm(settings["model"], dtype="float32"))
    mine.save(tmp_path / "mine.safetensors")
    own = gym.make("RAPPrune-v0", repair=str(tmp_path / "mine.safetensors"), **settings)
    assert own.unwrapped.memory.facts.repair == mine.sha256
    hashes = {env.unwrapped.memory.facts.repair for env in (plain, fitted, own)}
    assert len(hashes) == 3
    assert play(fitted, 0, masked=True)[-1][2]

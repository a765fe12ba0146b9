"""Vector environments made by name, in one process and in several."""

from __future__ import annotations

import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import rap_env
from rap_env.context import opening
from rap_env.errors import UnknownNameError
from tests.envs.playing import assert_same
from tests.tiny import tiny_model, tiny_tokenizer

SETTINGS = {
    "workload": "grid", "infeasible": "clip", "importance": "none", "store": None,
    "calibration": {"windows": 1, "window_tokens": 8},
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """Arguments of an environment on a tiny model in a folder."""
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return {**SETTINGS, "model": str(tmp_path / "model")}


def play(envs) -> list:
    seen = [envs.reset(seed=0)]
    for action in range(6):
        seen.append(envs.step(np.full(2, action % 4)))
    return seen


@pytest.mark.parametrize("version", ["RAPPrune-v0", "RAPLadder-v0"])
def test_vector_kwargs_work_in_every_mode(settings, version):
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    own = rap_env.make_vec(version, 2, vector_kwargs=mode, **settings)
    plain = gym.make_vec(version, 2, **mode, **settings)
    sync = [
        make(version, 2, vectorization_mode="sync", vector_kwargs=mode, **settings)
        for make in (rap_env.make_vec, gym.make_vec)
    ]
    assert isinstance(own, rap_env.RAPPruneVectorEnv | rap_env.RAPLadderVectorEnv)
    for envs in (own, plain, *sync):
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert_same(play(envs), play(own))
    assert isinstance(sync[0], SyncVectorEnv)
    with pytest.raises(UnknownNameError, match="'autoreset'.*Did you mean"):
        rap_env.make_vec(version, 2, vector_kwargs={"autoreset": "SameStep"}, **settings)


def test_the_main_process_does_not_warn_of_a_copy(settings, monkeypatch, caplog):
    monkeypatch.setattr(opening, "_open", {})
    gym.make("RAPLadder-v0", **settings)
    assert "own copy" not in caplog.text


def test_workers_that_load_a_model_each_say_so(settings, capfd):
    """A server that has imported the libraries once forks the workers."""
    libraries = ["torch", "transformers.models.llama.modeling_llama", "rap_env.envs.ladder"]
    multiprocessing.set_forkserver_preload(libraries)
    served = {"vectorization_mode": "async", "vector_kwargs": {"context": "forkserver"}}
    envs = gym.make_vec("RAPLadder-v0", 2, **served, **settings)
    assert isinstance(envs, AsyncVectorEnv)
    envs.reset(seed=0)
    envs.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if "own copy of model" in line]
    assert len(lines) == 2
    assert "leave out vectorization_mode" in lines[0]

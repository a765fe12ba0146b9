"""Vector environments made by name, in one process and in several."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time

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


@pytest.mark.parametrize("version", ["RAPPrune-v0", "RAPPrune-v1"])
def test_vector_kwargs_work_in_every_mode(settings, version):
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    own = rap_env.make_vec(version, 2, vector_kwargs=mode, **settings)
    plain = gym.make_vec(version, 2, **mode, **settings)
    sync = [
        make(version, 2, vectorization_mode="sync", vector_kwargs=mode, **settings)
        for make in (rap_env.make_vec, gym.make_vec)
    ]
    assert isinstance(own, rap_env.RAPPruneVectorEnv | rap_env.RAPPruneV1VectorEnv)
    for envs in (own, plain, *sync):
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert_same(play(envs), play(own))
    assert isinstance(sync[0], SyncVectorEnv)
    with pytest.raises(UnknownNameError, match="'autoreset'.*Did you mean"):
        rap_env.make_vec(version, 2, vector_kwargs={"autoreset": "SameStep"}, **settings)


def test_one_worker_alone_and_the_main_process_do_not_warn(settings, monkeypatch, caplog):
    for workers in ([], [os.getpid()], [1, os.getpid()]):  # process 1 is the first
        monkeypatch.setattr(opening, "worker_processes", lambda found=workers: found)
        monkeypatch.setattr(opening, "_open", {})
        gym.make("RAPPrune-v1", **settings)
    assert "load a copy" not in caplog.text


def test_workers_that_load_a_model_each_say_so_once(settings, capfd):
    """A server that has imported the libraries once forks the workers."""
    libraries = ["torch", "transformers.models.llama.modeling_llama", "rap_env.envs.prune_v1"]
    multiprocessing.set_forkserver_preload(libraries)
    served = {"vectorization_mode": "async", "vector_kwargs": {"context": "forkserver"}}
    with subprocess.Popen(["sleep", "60"]) as no_worker:
        envs = gym.make_vec("RAPPrune-v1", 2, **served, **settings)
        assert isinstance(envs, AsyncVectorEnv)
        envs.reset(seed=0)
        envs.close()
        no_worker.kill()
    lines = [line for line in capfd.readouterr().err.splitlines() if "load a copy" in line]
    assert len(lines) == 1
    assert "2 worker processes load a copy of model each: 2 x 0 MiB" in lines[0]
    assert "leave out vectorization_mode" in lines[0]


def test_spawned_workers_are_told_from_other_processes():
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    with subprocess.Popen(["sleep", "60"]) as no_worker:
        programs = [opening._program(str(process.pid)) for process in (*workers, no_worker)]
        for process in (*workers, no_worker):
            process.kill()
    assert programs[0] == programs[1] != programs[2]

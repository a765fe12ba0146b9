"""Sweeps as a user runs them: a stored study, names of runs, workers that share a store."""

import functools
import os
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.compare import compare
from experiments.config.program_settings import CompareConfig
from experiments.launch import CONF_DIR, register, runs_in_parallel
from experiments.study.run_folder import RunFolder
from tests.experiments.tiny_study import tiny_study
from tests.programs import run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def model(base):
    tiny_study(base, layers=2)


def run_train(base, *arguments, program="train"):
    """A sweep on the tiny model; its folder of runs is ``base/runs``."""
    arguments = [
        "-m", f"experiments.{program}", "-m",
        "model=custom", f"model.name={base / 'model'}",
        "threads=1", "model.device=cpu", "model.dtype=float32", "calibration.windows=1",
        "calibration.window_tokens=12", "importance=none", "workload=grid",
        "workload.batch_sizes=[1,2]", "workload.seq_lens_tokens=[16]",
        "workload.budget_fractions=[0.9]", "evaluate.requests=[1x16]", "evaluate.budgets=[0.9]",
        "agent.total_timesteps=64", "agent.n_envs=2", "agent.hyperparameters.batch_size=16",
        "agent.hyperparameters.n_steps=16", "progress=false", f"runs_dir={base / 'runs'}",
        f"store={base / 'scores.sqlite'}", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAP_CACHE_DIR": str(base / "cache")}
    return run_python(*arguments, env=environment, cwd=ROOT, timeout=280)


def runs_in(folder):
    return [RunFolder(path.parent).read() for path in sorted(folder.glob("*/run.json"))]


@pytest.mark.slow
def test_a_stored_study_gets_more_trials(base):
    import optuna  # takes seconds, and other tests do without

    url = f"sqlite:///{base / 'study.db'}"
    for seed in (0, 1):
        done = run_train(
            base, "+sweep=optuna", "name=tuning", "hydra.sweeper.n_trials=2",
            f"hydra.sweeper.storage={url}", f"hydra.sweeper.sampler.seed={seed}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="tuning", storage=url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    folder = base / "runs" / "tuning" / "train"
    runs = runs_in(folder)
    assert sorted(run["objective"] for run in runs) == sorted(t.value for t in study.trials)
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(run["objective"] for run in runs)


def test_runs_are_named_and_compared_by_what_varies(base):
    """A setting that no name had before varies; the fixed one is in no name."""
    done = run_train(base, "name=varied", "calibration.seed=0,1", "agent.hyperparameters.gamma=0.9")
    assert done.returncode == 0, done.stderr
    folder = base / "runs" / "varied"
    names = sorted(path.parent.name for path in folder.glob("train/*/run.json"))
    assert names == ["maskable_ppo-seed=0-s0", "maskable_ppo-seed=1-s0"]
    runs = runs_in(folder / "train")
    assert [run["swept"] for run in runs] == [{"calibration.seed": 0}, {"calibration.seed": 1}]
    best = min(run["objective"] for run in runs)
    text = compare(CompareConfig(runs=str(folder)))
    lines = text.split("what varies ==")[1].splitlines()
    assert lines[2].split() == ["seed", "Trained", "Objective"]
    assert lines[4].endswith(f"{best:.4f}"), "the best run comes first"


@pytest.mark.slow
def test_two_jobs_run_in_the_executor_of_the_slurm_launcher(base):
    """`slurm_local` submits as `slurm` does, to processes in the place of a queue."""
    done = run_train(base, "name=queued", "seed=0,1", "hydra/launcher=slurm_local",
                     program="profile")  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = base / "runs" / "queued" / "profile"
    runs = runs_in(folder)
    assert len(runs) == 2
    assert all(run["finished"] for run in runs)
    settings = [yaml.safe_load(path.read_text()) for path in folder.glob("*/config.yaml")]
    assert sorted((each["seed"], each["threads"]) for each in settings) == [(0, 1), (1, 1)]
    assert len(list(folder.glob("*/one_shot.json"))) == 2
    assert len(list(folder.glob(".submitit/*/*_log.out"))) == 2


@functools.cache
def composed(*overrides):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


def test_only_parallel_jobs_get_one_thread():
    multirun = "hydra.mode=MULTIRUN"
    assert runs_in_parallel(composed("hydra/launcher=local", multirun).hydra)
    assert not runs_in_parallel(composed("hydra/launcher=local", "hydra.mode=RUN").hydra)
    assert not runs_in_parallel(composed(multirun).hydra)

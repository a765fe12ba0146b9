"""A trial is found in its study, compared at marks, and stopped only where it may be."""

from __future__ import annotations

import optuna
import pytest
from omegaconf import OmegaConf

from experiments.errors import TrialPrunedError
from experiments.training.optuna_trials import (
    Pruning,
    RunningTrial,
    StudyCallback,
    running_trial,
    trial_number,
)

MARKS = 4
STEPS = 400


@pytest.fixture
def storage(tmp_path):
    return optuna.storages.get_storage(f"sqlite:///{tmp_path}/study.db")


@pytest.fixture
def study(storage):
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2)
    return optuna.create_study(study_name="tuning", storage=storage, pruner=pruner)


def finished(study, losses):
    trial = study.ask()
    for mark, loss in enumerate(losses, start=1):
        trial.report(loss, mark)
    study.tell(trial, losses[-1])


@pytest.fixture
def pruning(study, storage, tmp_path):
    """That of a third trial, after two whose losses fell to 0.5, with a checkpoint."""
    for _ in range(2):
        finished(study, [0.9, 0.7, 0.5])
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    trial = RunningTrial(study, storage, study.ask().number, MARKS)
    return Pruning(trial, STEPS, tmp_path)


def test_the_mean_of_recent_episodes_is_reported_once_a_mark(study, pruning):
    for step, loss in ((50, 0.2), (100, 0.4), (120, 0.9), (199, 0.5)):
        pruning({"episode/loss": loss}, step)
    assert study.trials[-1].intermediate_values == {1: pytest.approx(0.3)}
    pruning({"train/loss": 7.0}, 200)
    assert study.trials[-1].intermediate_values[2] == pytest.approx(0.5)
    for step in (380, 400):
        pruning({"episode/loss": 0.5}, step)
    assert set(study.trials[-1].intermediate_values) == {1, 2, 3}, "the end is no mark"


def test_a_trial_worse_than_the_median_stops_after_the_warm_up(pruning):
    pruning({"episode/loss": 5.0}, 100)
    with pytest.raises(TrialPrunedError, match=r"Trial 2 .* at step 210.* 5\.000 is worse"):
        pruning({"episode/loss": 5.0}, 210)


def test_one_that_is_as_good_goes_on(pruning):
    for step in (100, 200, 300):
        pruning({"episode/loss": 0.5}, step)


def test_nothing_stops_before_there_is_a_checkpoint_to_judge(pruning, study, tmp_path):
    (tmp_path / "checkpoints" / "step_1").rmdir()
    pruning({"episode/loss": 5.0}, 300)
    assert study.trials[-1].intermediate_values == {}


def test_a_trial_is_found_by_its_hyperparameters_and_is_the_newest(study):
    space = {"agent.rate": 0.1, "++agent.hidden": 64}
    distributions = {
        "agent.rate": optuna.distributions.UniformDistribution(0.0, 1.0),
        "++agent.hidden": optuna.distributions.CategoricalDistribution([32, 64]),
    }
    numbers = []
    for rate in (0.1, 0.25, 0.1):  # the first was killed
        study.enqueue_trial({**space, "agent.rate": rate})
        numbers.append(study.ask(distributions).number)
    given = ["++agent.hidden=64", "name=x", "agent.rate=0.1"]
    assert trial_number(study, given) == numbers[2]
    assert trial_number(study, ["agent.rate=0.25", "++agent.hidden=64"]) == numbers[1]
    assert trial_number(study, ["agent.rate=0.25", "++agent.hidden=32"]) is None
    study.tell(numbers[1], 0.5)
    assert trial_number(study, ["agent.rate=0.25", "++agent.hidden=64"]) is None


def test_outside_a_sweep_there_is_no_trial():
    assert running_trial() is None


def settings(tmp_path, trials, jobs=1):
    url = f"sqlite:///{tmp_path}/sweep/study.db"
    return OmegaConf.create({"hydra": {
        "sweep": {"dir": str(tmp_path / "sweep")},
        "sweeper": {"study_name": "tuning", "n_trials": trials, "n_jobs": jobs,
                    "sampler": {"seed": 3},
                    "storage": {"_target_": "optuna.storages.RDBStorage", "url": url}},
    }})  # fmt: skip


def test_what_is_done_counts_towards_the_length_of_the_study(tmp_path):
    callback = StudyCallback(marks=MARKS, pruner=None)
    config = settings(tmp_path, trials=5, jobs=-1)
    callback.on_multirun_start(config)
    assert (config.hydra.sweeper.n_trials, config.hydra.sweeper.sampler.seed) == (5, 3)
    assert config.hydra.sweeper.n_jobs >= 1
    study = optuna.create_study(study_name="tuning", storage=config.hydra.sweeper.storage.url)
    for _ in range(3):
        finished(study, [1.0])
    study.ask()  # was killed
    config = settings(tmp_path, trials=5)
    OmegaConf.set_readonly(config, True)
    callback.on_multirun_start(config)
    assert (config.hydra.sweeper.n_trials, config.hydra.sweeper.sampler.seed) == (2, 6)
    config = settings(tmp_path, trials=2)
    callback.on_multirun_start(config)
    assert config.hydra.sweeper.n_trials == 0

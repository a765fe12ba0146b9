"""The objective that a sweep minimises, and trials of an Optuna study."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from agents.trained_policy import TrainedPolicy
from experiments.comparison.evaluation import grid_requests
from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.contexts import build_context
from experiments.study.records import read_records
from experiments.study.run_folder import RunFolder
from experiments.train import facts_of_stopped, is_done, run_trial
from experiments.training.sweeps import (
    Pruning,
    RunningTrial,
    StudyCallback,
    TrialPrunedError,
    objective,
    running_trial,
    trial_number,
)
from rap_env.errors import CorpusError
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.tiny_study import own_text, short_training, tiny_study


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers."""
    return tiny_study(
        base, stage="train", threads=1,
        agent=short_training(32),
        evaluate=EvaluateConfig(requests=["1x16", "2x32"], budgets=[0.9, 0.8]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config):
    folder = config.stage_dir("train") / "maskable_ppo-s0"
    run_trial(config, folder)
    return folder


def expected(config, folder, scorer):
    """The mean loss, from parts of the library alone."""
    context = build_context(config)
    policy = TrainedPolicy.load(folder, context)
    masks = [policy.choose(request)
             for _, request in grid_requests(config.evaluate, context.memory)]  # fmt: skip
    return sum(scorer.nll(mask) - scorer.dense_nll for mask in masks) / len(masks)


def test_the_objective_is_the_mean_loss_on_the_grid(config, trained):
    found = RunFolder(trained).read()
    assert found["objective"] == pytest.approx(
        expected(config, trained, build_context(config).scorer)
    )
    assert found["objective_on"]["text"] == "calibration"
    assert found["pruned"] is False
    last = read_records(trained / "metrics.jsonl")[-1]
    assert (last["objective"], last["step"]) == (found["objective"], found["timesteps"])


def test_a_finished_run_returns_its_objective_without_training(config, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    assert run_trial(config, trained) == RunFolder(trained).read()["objective"]
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_the_objective_on_another_text_is_measured_again(config, trained, tmp_path):
    text = own_text(2, 12, 7)
    other = replace(config, evaluate=replace(config.evaluate, selection=text))
    context = build_context(config)
    corpus = load_corpus(
        CorpusConfig(source="self", windows=2, window_tokens=12, seed=7, role="selection"),
        context.llm,
    )
    assert corpus.sha256 != context.scorer.corpus.sha256
    found = objective(other, trained)
    assert found == pytest.approx(expected(config, trained, MaskScorer(context.llm, corpus)))
    assert RunFolder(trained).read()["objective_on"]["text"]["seed"] == 7
    assert found != objective(config, trained)


def test_the_calibration_text_is_rejected_as_selection_text(config, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh. " * 60)
    text = TextConfig(source=str(path), windows=2, window_tokens=12)
    same = replace(
        config, name="same", calibration=text, evaluate=replace(config.evaluate, selection=text)
    )
    folder = same.stage_dir("train") / "maskable_ppo-s0"
    with pytest.raises(CorpusError, match="calibration and the selection text share"):
        run_trial(same, folder)
    assert not (folder / "checkpoints").exists(), "refused before it trains"


def test_a_stopped_run_counts_as_its_last_checkpoint(trained):
    stop = TrialPrunedError("worse than others")
    facts = facts_of_stopped(trained, object(), stop)
    assert (facts["pruned"], facts["stopped"]) == (True, "worse than others")
    assert facts["timesteps"] == RunFolder(trained).read()["timesteps"]
    with pytest.raises(TrialPrunedError):
        facts_of_stopped(trained, None, stop)
    record = {"finished": "now", "pruned": True, "timesteps": 8}
    assert is_done(record, 32, object())
    assert not is_done(record, 32, None), "without the sweep it is trained to its end"


MARKS = 4

STEPS = 400


@pytest.fixture(scope="module")
def optuna():
    """The library, whose import takes seconds."""
    import optuna

    return optuna


@pytest.fixture
def storage(optuna, tmp_path):
    return optuna.storages.get_storage(f"sqlite:///{tmp_path}/study.db")


@pytest.fixture
def study(optuna, storage):
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


def test_the_mean_of_recent_episodes_is_reported_at_each_mark(study, pruning):
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


def test_a_trial_as_good_as_the_median_continues(pruning):
    for step in (100, 200, 300):
        pruning({"episode/loss": 0.5}, step)


def test_no_trial_is_pruned_before_its_first_checkpoint(pruning, study, tmp_path):
    (tmp_path / "checkpoints" / "step_1").rmdir()
    pruning({"episode/loss": 5.0}, 300)
    assert study.trials[-1].intermediate_values == {}


def test_a_trial_is_found_by_its_hyperparameters_and_is_the_newest(optuna, study):
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


def test_finished_trials_count_towards_the_study_length(optuna, tmp_path):
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

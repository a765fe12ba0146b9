import errno
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import checkpoint as checkpoints
from agents import training
from agents.algorithms import ALGORITHMS, AgentConfig
from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from agents.training import TrainingDivergedError, train
from rap_env.errors import ArtifactError, StorageFullError
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from tests.agents.ladders import SPEC, LadderContext
from tests.agents.policies import envs_for
from tests.agents.synthetic import make_envs, request_at

ROOT = Path(__file__).parents[2]
_SHORT_PPO = {"n_steps": 16, "batch_size": 32, "n_epochs": 2}
_SHORT_DQN = {"learning_starts": 64, "batch_size": 16, "train_freq": 4}
SHORT = {name: _SHORT_DQN if "dqn" in name else _SHORT_PPO for name in ALGORITHMS}


def short(name="maskable_ppo", steps=256, **settings):
    given = {"n_envs": 2, "hyperparameters": SHORT[name], **settings}
    return AgentConfig(name, total_timesteps=steps, **given)


class Interrupt(Exception):
    pass


def into(rows):
    def sink(metrics, step):
        same = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        rows.append({"step": step, **same})

    return sink


def stop_at(step):
    def sink(_metrics, now):
        if now >= step:
            raise Interrupt

    return sink


@pytest.fixture
def often(monkeypatch):
    """DQN writes checkpoints often enough for short tests."""
    for name in ("dqn", "masked_dqn"):
        often = replace(ALGORITHMS[name], checkpoint_steps=40)
        monkeypatch.setitem(ALGORITHMS, name, often)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_interrupted_training_goes_on_where_it_was(tmp_path, any_context, name, often):
    config, envs, cut, rest = short(name, 160), envs_for(any_context), [], []
    with pytest.raises(Interrupt):
        train(config, envs, tmp_path, log_fns=[into(cut), stop_at(100)], progress=False)
    saved = latest_checkpoint(tmp_path / "checkpoints")
    model = saved.load_model(training.make_vector_env(config, envs))
    assert model.num_timesteps == saved.step
    rewards = model.get_vec_normalize_env().ret_rms
    assert (float(rewards.mean), float(rewards.var)) == (
        saved.body["rewards"]["mean"],
        saved.body["rewards"]["var"],
    )
    assert rewards.count > saved.step, "of all steps before it, and a small initial count"
    if "dqn" in name:
        assert model.replay_buffer.size() * config.n_envs == saved.step
    result = train(config, envs, tmp_path, log_fns=[into(rest)], progress=False)
    # The stop comes with the first episode that ends after step 100.
    assert 0 < saved.step < config.total_timesteps
    episodes = [row["episode/number"] for row in rest if "episode/number" in row]
    assert (result.timesteps, result.episodes) == (160, episodes[-1])
    assert min(row["step"] for row in rest) > saved.step
    finished = train(config, envs, tmp_path, progress=False)
    assert finished.episodes == result.episodes, "it is not repeated"


def damage(path):
    if path.suffix == ".zip":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text(path.read_text().replace('"step": ', '"step": 1'))


@pytest.mark.parametrize(
    "file", ["model.zip", pytest.param("checkpoint.json", marks=pytest.mark.slow)]
)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, context, file, caplog):
    train(short(), make_envs(context), tmp_path, progress=False)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_000000224", "step_000000256"]
    damage(folders[1] / file)
    assert latest_checkpoint(tmp_path / "checkpoints").step == 224
    assert "step_000000256 is damaged and is not used." in caplog.text
    assert train(short(), make_envs(context), tmp_path, progress=False).timesteps == 256
    assert latest_checkpoint(tmp_path / "checkpoints").step == 256, "it is written anew"
    for folder in sorted((tmp_path / "checkpoints").iterdir()):
        damage(folder / file)
    with pytest.raises(ArtifactError, match="No checkpoint in .* can be used; delete them"):
        train(short(), make_envs(context), tmp_path, progress=False)
    with pytest.raises(ArtifactError, match="No checkpoint in"):
        TrainedPolicy.load(tmp_path, context)


def test_a_checkpoint_without_its_model_is_damaged(tmp_path, context):
    train(short(steps=64), make_envs(context), tmp_path, progress=False)
    for model in (tmp_path / "checkpoints").glob("*/model.zip"):
        model.unlink()
    with pytest.raises(ArtifactError, match="delete them, .*model.zip"):
        train(short(steps=64), make_envs(context), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"name": "ppo"}, "started with name='maskable_ppo' and cannot resume with name='ppo'"),
        ({"hyperparameters": {**SHORT["ppo"], "gamma": 0.9}}, "started with hyperparameters="),
        ({"policy_settings": {"without": ["gsi"]}}, "started with policy_settings=.*without"),
    ],
)
def test_resuming_with_other_settings_is_rejected(tmp_path, context, other, text):
    train(short(steps=32), make_envs(context), tmp_path, progress=False)
    with pytest.raises(ArtifactError, match=text):
        train(short(**other), make_envs(context), tmp_path, progress=False)


def test_resuming_with_another_ladder_is_rejected(tmp_path):
    context = LadderContext()
    train(short(steps=32), envs_for(context), tmp_path, progress=False)
    other = envs_for(context, spec={**SPEC, "together": []})
    with pytest.raises(ArtifactError, match="ladder=.*'int8', 'int4'.* cannot resume with ladder="):
        train(short(), other, tmp_path, progress=False)


def test_resuming_on_another_model_is_rejected(tmp_path, context, real_context):
    train(short(steps=32), make_envs(context), tmp_path, progress=False)
    workload = {"name": "fixed", "batch_size": 1, "seq_len_tokens": 16}
    with pytest.raises(ArtifactError, match="observation_space=.*cannot resume"):
        train(short(), make_envs(real_context, workload=workload), tmp_path, progress=False)


def test_a_warm_start_happens_once(tmp_path, context):
    calls, before = [], context.scorer.evaluations

    def warm_start(model):
        calls.append(model.num_timesteps)
        context.scorer.nll(Plan.removing(0, 2, 4, 6, 8, 10))  # a teacher may score masks
        time.sleep(0.1)
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter.fill_(0.01)

    settings = {"progress": False, "warm_start": warm_start}
    result = train(short(steps=32), make_envs(context), tmp_path, **settings)
    assert calls == [0]
    assert result.seconds > 0.1
    assert result.evaluations == context.scorer.evaluations - before
    model = latest_checkpoint(tmp_path / "checkpoints").load_model()
    values = [p.detach().ravel() for p in model.policy.parameters()]
    assert torch.cat(values).sub(0.01).abs().max() < 0.05  # a few steps from where it began
    train(short(steps=64), make_envs(context), tmp_path, **settings)
    assert calls == [0]


def test_full_disk_leaves_the_last_checkpoint(tmp_path, context, monkeypatch):
    train(short(steps=64), make_envs(context), tmp_path, progress=False)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_artifact", full)
    with pytest.raises(StorageFullError, match="No space left while writing"):
        train(short(steps=128), make_envs(context), tmp_path, progress=False)
    assert latest_checkpoint(tmp_path / "checkpoints").step == 64
    assert not list((tmp_path / "checkpoints").glob(".new-*"))


@pytest.mark.parametrize("name", ["maskable_ppo", "masked_dqn"])
def test_divergence_raises_an_error_with_a_remedy(tmp_path, context, monkeypatch, name, often):
    models = []
    made = training.make_model

    def remembered(*args):
        models.append(made(*args))
        return models[-1]

    def poison(_metrics, now):
        if now >= 100:
            for parameter in models[0].policy.parameters():
                parameter.data.fill_(torch.nan)

    monkeypatch.setattr(training, "make_model", remembered)
    with pytest.raises(TrainingDivergedError, match="NaN or infinite.*lower learning_rate"):
        train(short(name), make_envs(context), tmp_path, log_fns=[poison], progress=False)
    saved = latest_checkpoint(tmp_path / "checkpoints").load_model()
    assert all(bool(torch.isfinite(p).all()) for p in saved.policy.parameters())


def test_metrics_describe_the_training(tmp_path, context):
    lines = []
    before = context.scorer.evaluations
    result = train(
        short("ppo", steps=512),
        make_envs(context),
        tmp_path,
        log_fns=[lambda metrics, step: lines.append((step, metrics))],
        progress=False,
    )
    episodes = [metrics for _, metrics in lines if "episode/return" in metrics]
    assert len(episodes) == result.episodes == episodes[-1]["episode/number"]
    fitting = [m for m in episodes if m["episode/fits"]]
    assert np.isfinite([m["episode/delta_nll"] for m in fitting]).all()
    assert len(fitting) > 10
    for metrics in fitting:  # return = -loss - 0.1 for each invalid action
        expected = -metrics["episode/delta_nll"] - 0.1 * metrics["episode/invalid_actions"]
        assert metrics["episode/return"] == pytest.approx(expected, abs=1e-4)
    assert any(metrics["episode/invalid_actions"] > 0 for metrics in episodes)
    updates = [metrics for _, metrics in lines if "train/loss" in metrics]
    assert len(updates) == 512 // 32
    assert {"train/value_loss", "train/entropy_loss"} <= set(updates[0])
    assert result.evaluations == context.scorer.evaluations - before
    assert [step for step, _ in lines] == sorted(step for step, _ in lines)


def mean_loss(context, method):
    shapes = [(1, 10), (1, 500), (8, 500), (4, 2000)]
    requests = [request_at(context, *shape, f) for shape in shapes for f in (0.6, 0.7, 0.8, 0.9)]
    return np.mean([context.scorer.loss(method.choose(request)) for request in requests])


@pytest.mark.parametrize(
    "name",
    [
        "ppo",
        "maskable_ppo",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("dqn", "masked_dqn")),
    ],
)
def test_every_agent_learns(tmp_path, context, name):
    """On losses with a known optimum, a trained policy beats random and one-shot."""
    quick = {"learning_starts": 200, "batch_size": 32, "learning_rate": 0.003}
    hyperparameters = {**quick, "target_update_interval": 25} if "dqn" in name else {}
    config = AgentConfig(name, total_timesteps=1500, n_envs=8, hyperparameters=hyperparameters)
    train(config, make_envs(context), tmp_path, progress=False)
    learned = mean_loss(context, TrainedPolicy.load(tmp_path, context))
    assert learned < 0.5 * mean_loss(context, make_method("random", context))
    assert learned < mean_loss(context, make_method("one_shot", context))

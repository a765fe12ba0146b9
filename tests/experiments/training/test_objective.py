"""What a sweep minimises: the policy's mean loss on the grid, on the text for choosing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents.trained_policy import TrainedPolicy
from experiments.comparison.grid import grid_requests
from experiments.comparison.records import read_records
from experiments.comparison.run_folder import RunFolder
from experiments.config import (
    AgentConfig,
    Config,
    EvaluateConfig,
    ImportanceConfig,
    ModelConfig,
    TextConfig,
)
from experiments.contexts import open_bench
from experiments.errors import TrialPrunedError
from experiments.train import facts_of_stopped, is_done, run_trial
from experiments.training.objective import objective
from rap_env.errors import CorpusError
from rap_env.scoring.corpus import CorpusConfig, load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings for a random model of four layers."""
    base = tmp_path_factory.mktemp("objective")
    tiny_model(layers=4).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="train", name="tiny", runs_dir=str(base / "runs"), progress=False,
            store=str(base / "scores.sqlite"), threads=1, reward={"name": "perplexity"},
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source="self", windows=3, window_tokens=12),
            importance=ImportanceConfig(method="none"),
            workload={"name": "grid", "batch_sizes": [1, 2], "seq_lens_tokens": [16],
                      "budget_fractions": [0.9]},
            agent=AgentConfig(name="maskable_ppo", total_timesteps=32, n_envs=2,
                              hyperparameters={"n_steps": 16, "batch_size": 16}),
            evaluate=EvaluateConfig(requests=["1x16", "2x32"], budgets=[0.9, 0.8]),
        )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config):
    folder = config.stage_dir("train") / "maskable_ppo-s0"
    run_trial(config, folder)
    return folder


def expected(config, folder, scorer):
    """The mean loss, from parts of the library alone."""
    context = open_bench(config)
    policy = TrainedPolicy.load(folder, context)
    masks = [policy.choose(request)
             for _, request in grid_requests(config.evaluate, context.memory)]  # fmt: skip
    return sum(scorer.nll(mask) - scorer.dense_nll for mask in masks) / len(masks)


def test_it_is_the_mean_loss_on_the_grid_and_in_the_run(config, trained):
    found = RunFolder(trained).read()
    assert found["objective"] == pytest.approx(expected(config, trained, open_bench(config).scorer))
    assert found["objective_on"]["text"] == "calibration"
    assert found["pruned"] is False
    last = read_records(trained / "metrics.jsonl")[-1]
    assert (last["objective"], last["step"]) == (found["objective"], found["timesteps"])


def test_a_finished_run_gives_it_without_training(config, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    assert run_trial(config, trained) == RunFolder(trained).read()["objective"]
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_on_another_text_it_is_measured_again(config, trained, tmp_path):
    text = TextConfig(source="self", windows=2, window_tokens=12, seed=7)
    other = replace(config, evaluate=replace(config.evaluate, selection=text))
    context = open_bench(config)
    corpus = load_corpus(
        CorpusConfig(source="self", windows=2, window_tokens=12, seed=7, role="selection"),
        context.llm,
    )
    assert corpus.sha256 != context.scorer.corpus.sha256
    found = objective(other, trained)
    assert found == pytest.approx(expected(config, trained, MaskScorer(context.llm, corpus)))
    assert RunFolder(trained).read()["objective_on"]["text"]["seed"] == 7
    assert found != objective(config, trained)


def test_the_calibration_text_is_no_selection_text(config, tmp_path):
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
